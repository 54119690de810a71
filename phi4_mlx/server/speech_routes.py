"""The routes that make text of speech: a form with a file in, a transcript out, at once or as it grows."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phi4_mlx.server.apis.transcriptions import Task, Transcript, parse
from phi4_mlx.server.apis.wire import IGNORED, WireError, ignored_header
from phi4_mlx.server.bodies import Receive, share_of
from phi4_mlx.server.disconnect import ClientGone, unless_gone
from phi4_mlx.server.event_stream import EventStream, collected, paced
from phi4_mlx.server.guard import UPLOAD_PATHS
from phi4_mlx.server.request_log import CANCELLED, entry_of
from phi4_mlx.server.service import Service
from phi4_mlx.server.speech import transcribed
from phi4_mlx.server.upload import FILE, Upload


@dataclass(frozen=True)
class SpeechRoutes:
    """The routes of a service.

    Attributes:
        service: answers the requests.
        counts: number of answers by route and status.
    """

    service: Service
    counts: Counter[tuple[str, int]]

    def routes(self) -> list[Route]:
        """A route for each task."""
        tasks: tuple[Task, ...] = ("transcribe", "translate")
        return [
            Route(path, self._answering(task), methods=["POST"]) for path, task in zip(UPLOAD_PATHS, tasks, strict=True)
        ]

    def _answering(self, task: Task) -> Callable[[Request], Awaitable[Response]]:
        async def route(request: Request) -> Response:
            if self.service.media is None:
                raise WireError(400, "this model reads only text; a transcript needs one that reads sound")
            kind = request.headers.get("content-type", "")
            if not kind.lower().startswith("multipart/form-data"):
                raise WireError(415, f"content-type is {kind!r:.100}; it must be multipart/form-data")
            share_of(request.scope).upload()
            upload = Upload(kind)
            try:
                await upload.read(_body(request.receive))
                response = await self._answer(request, upload, task)
            except BaseException:
                upload.close()
                raise
            self.counts[request.url.path, response.status_code] += 1
            return response

        return route

    async def _answer(self, request: Request, upload: Upload, task: Task) -> Response:
        speech = parse(upload.fields, task)
        speech = replace(speech, ask=self.service.served(speech.ask))
        if upload.path is None:
            raise WireError(400, "the form has no file", FILE)
        entry, transcript = entry_of(request.scope), Transcript(speech)
        entry.ask = speech.ask

        async def texts(path: str) -> AsyncGenerator[str, None]:
            with contextlib.closing(upload):
                async with contextlib.aclosing(transcribed(self.service, speech, path, transcript)) as found:
                    async for text in found:
                        entry.prompt_tokens = transcript.prompt_tokens
                        yield text

        try:
            if speech.ask.stream:
                items = paced(texts(upload.path))
                first = await unless_gone(request.receive, _first(items))
                response: Response = EventStream(transcript, first, items)
            else:
                await unless_gone(request.receive, collected(texts(upload.path)))
                body, kind = transcript.body()
                response = Response(body, media_type=kind)
        except ClientGone:
            entry.cancelled = True
            response = Response(status_code=CANCELLED)  # never sent
        if speech.ask.ignored:
            entry.ignored = response.headers[IGNORED] = ignored_header(speech.ask.ignored)
        return response


async def _first(items: AsyncGenerator[str | None, None]) -> str | None:
    """The first item, before the status is sent, so that an early failure has its own; none of a silent sound."""
    return await anext(items, None)


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        more = message.get("more_body", False)
        if data := message.get("body", b""):
            yield data

"""The HTTP routes, and responses that send an answer in one body or as server-sent events."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.apis import chat as chat_api
from phi4_mlx.server.apis import completions as completions_api
from phi4_mlx.server.apis import messages as messages_api
from phi4_mlx.server.apis import responses as responses_api
from phi4_mlx.server.apis.answer import Answer
from phi4_mlx.server.apis.fields import parse_json
from phi4_mlx.server.apis.wire import IGNORED, Ask, Delta, End, WireError, ignored_header
from phi4_mlx.server.bodies import Receive, Scope, Send, share_of
from phi4_mlx.server.disconnect import ClientGone, unless_gone
from phi4_mlx.server.event_stream import EventStream, collected, paced
from phi4_mlx.server.guard import refuse
from phi4_mlx.server.json_response import JsonResponse
from phi4_mlx.server.page_files import page_file
from phi4_mlx.server.request_log import CANCELLED, entry_of
from phi4_mlx.server.service import Service
from phi4_mlx.server.speech_routes import SpeechRoutes
from phi4_mlx.server.tools import ServerTools

LARGE_BODY = 2**18  # bytes; a larger one is parsed in a thread, because 16 MB take up to two seconds

Parse = Callable[[Any, int, Sampling, bool], Ask]  # body, vocabulary, defaults, takes media
MakeAnswer = Callable[[Ask, int, int], Answer]  # request, seconds since 1970, prompt tokens


@dataclass(frozen=True)
class App:
    """The routes of a service.

    Attributes:
        service: answers the requests.
        tools: the server's own, for the page.
        created: the time of the start, in seconds since 1970.
        counts: number of answers by route and status, for /metrics.
    """

    service: Service
    tools: ServerTools = field(default_factory=ServerTools)
    created: int = field(default_factory=lambda: int(time.time()))
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)

    def starlette(self) -> Starlette:
        """The ASGI application."""
        answering = {
            "/v1/chat/completions": self._answering(chat_api.parse, chat_api.ChatAnswer),
            "/v1/completions": self._answering(completions_api.parse, self._completion),
            "/v1/responses": self._answering(responses_api.parse, responses_api.ResponseAnswer),
            "/v1/messages": self._answering(messages_api.parse, messages_api.MessageAnswer),
            "/v1/messages/count_tokens": self.count_tokens,
            "/v1/embeddings": self.embeddings,
        }
        routes = [
            Route("/", self.page),
            Route("/page/{path:path}", self.page),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            *self.tools.routes(),
            *SpeechRoutes(self.service, self.counts).routes(),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in answering.items()),
        ]
        handlers: dict[Any, Any] = {WireError: self._refused, HTTPException: self._http_error, Exception: self._broken}
        app = Starlette(routes=routes, exception_handlers=handlers, middleware=[Middleware(PlainPaths)])
        app.router.redirect_slashes = False  # PlainPaths would take the slash out again, without end
        return app

    async def page(self, request: Request) -> Response:
        """The chat page, or one of its files."""
        found = page_file(request.path_params.get("path", "index.html"))
        if found is None:
            raise HTTPException(404)
        return found.answer(request)

    async def health(self, request: Request) -> Response:
        """The state of the engine; status 200 if it answers."""
        supervisor = self.service.supervisor
        pong = await supervisor.ping()
        status = "ok" if pong else "busy" if supervisor.state == "ready" else supervisor.state
        body = {"status": status, "restarts": supervisor.restarts, "jobs": supervisor.jobs}
        return JsonResponse(body, 200 if pong else 503)

    async def metrics(self, request: Request) -> Response:
        """Counts and sizes, in Prometheus' text format."""
        supervisor = self.service.supervisor
        pong = await supervisor.ping()
        gauges = {"up": float(pong is not None), "engine_restarts_total": supervisor.restarts, "jobs": supervisor.jobs}
        lines = [f"phi4_mlx_{name} {value:g}" for name, value in (gauges | dict(pong.gauges if pong else {})).items()]
        for (route, code), count in sorted(self.counts.items()):
            lines.append(f'phi4_mlx_answers_total{{route="{route}",status="{code}"}} {count}')
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """All models and adapters that a client may name; in Anthropic's form for its clients."""
        names = list(self.service.models)
        if "anthropic-version" in request.headers:
            since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.created))
            head = {"type": "model", "created_at": since}
            data = [
                {**head, "id": name, "display_name": name, "capabilities": self._capabilities(name)} for name in names
            ]
            return JsonResponse({"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]})
        return JsonResponse({"object": "list", "data": [self._model_json(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """One model or adapter."""
        name = request.path_params["model"]
        if name not in self.service.models:
            raise WireError(404, f"there is no model {name!r:.100}", "model", "model_not_found")
        return JsonResponse(self._model_json(name))

    async def count_tokens(self, request: Request) -> Response:
        """The length in tokens of a prompt of /v1/messages."""
        ask = await self._parse(messages_api.parse, await request.body())
        _, (prompt,) = await self.service.prompts(ask, must_fit=False, hold=share_of(request.scope).hold)
        return JsonResponse({"input_tokens": len(prompt)})

    async def embeddings(self, request: Request) -> Response:
        """Refused: this model makes no embeddings."""
        error = WireError(501, "this model makes no embeddings")
        return self._refusal(request, error, {"x-should-retry": "false"})  # clients retry any other 5xx

    def _model_json(self, name: str) -> JsonObject:
        """A model in OpenAI's form; what it takes as OpenRouter says it; its context length and kind for the page."""
        inputs = self._inputs(name)
        fitting: JsonObject = {"context_length": self.service.supervisor.longest, "kind": self.service.kind}
        fitting["architecture"] = {"input_modalities": inputs, "output_modalities": ["text"]}
        if self.service.media is not None and "image" in inputs:
            settings = self.service.media.settings
            fitting["media"] = {"crop_size": settings.crop_size, "max_crops": settings.max_crops}
        return {"id": name, "object": "model", "created": self.created, "owned_by": "phi4_mlx", **fitting}

    def _capabilities(self, name: str) -> JsonObject:
        """The capabilities of a model, in Anthropic's form."""
        return {"image_input": {"supported": "image" in self._inputs(name)}}

    def _inputs(self, name: str) -> list[str]:
        """The kinds of parts that a model takes; an adapter of the user's takes text alone."""
        takes_media = self.service.media is not None and self.service.models[name] is None
        return ["text", "image", "audio"] if takes_media else ["text"]

    def _completion(self, ask: Ask, created: int, prompt_tokens: int) -> Answer:
        decode = self.service.tokenizer.decode
        texts = [each if isinstance(each, str) else decode(each) for each in ask.prompts] if ask.echo else []
        return completions_api.CompletionAnswer(ask, created, prompt_tokens, prompt_texts=texts)

    async def _parse(self, parse: Parse, data: bytes) -> Ask:
        def read() -> Ask:
            service = self.service
            return parse(parse_json(data), service.vocabulary, service.sampling, service.media is not None)

        return self.service.served(await asyncio.to_thread(read) if len(data) > LARGE_BODY else read())

    def _answering(self, parse: Parse, make: MakeAnswer) -> Callable[[Request], Awaitable[Response]]:
        """A route that answers with generated text."""

        async def route(request: Request) -> Response:
            entry = entry_of(request.scope)
            entry.ask = ask = await self._parse(parse, await request.body())
            ask, prompts = await self.service.prompts(ask, hold=share_of(request.scope).hold)
            entry.prompt_tokens = sum(map(len, prompts))
            jobs, ignored = await self.service.jobs(ask, prompts)
            items = entry.observed(self.service.answers(ask, jobs))
            answer = make(ask, int(time.time()), entry.prompt_tokens)
            try:
                if ask.stream:
                    paced_items = paced(items)
                    # Before the status is sent, so that an early failure has its own.
                    first = await unless_gone(request.receive, anext(paced_items))
                    response: Response = EventStream[Delta | End](answer, first, paced_items)
                else:
                    response = JsonResponse(answer.body(await unless_gone(request.receive, collected(items))))
            except ClientGone:
                entry.cancelled = True
                response = Response(status_code=CANCELLED)  # never sent
            if ignored:
                entry.ignored = response.headers[IGNORED] = ignored_header(ignored)
            self.counts[request.url.path, response.status_code] += 1
            return response

        return route

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, WireError)
        return self._refusal(request, error)

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = error.status_code
        if status == 405 and request.method == "OPTIONS":
            return Response(status_code=204, headers=error.headers)
        messages = {404: "there is no such route", 405: f"this route does not accept {request.method}"}
        return self._refusal(request, WireError(status, messages.get(status, str(error.detail))), error.headers)

    async def _broken(self, request: Request, error: Exception) -> Response:
        return self._refusal(request, WireError(500, f"the server could not answer: {type(error).__name__}"))

    def _refusal(self, request: Request, error: WireError, headers: Mapping[str, str] | None = None) -> Response:
        # A path that a client chooses must not become a line of /metrics.
        known = request.scope.get("endpoint") is not None and not request.path_params
        self.counts[request.url.path if known else "other", error.status] += 1
        return Refusal(error, headers or {})


class PlainPaths:
    """An ASGI application that takes double and trailing slashes, and a second /v1, out of the path of a request.

    Clients join them from a base URL that already ends with a slash or with /v1.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on with its plain path."""
        if scope["type"] == "http":
            path = re.sub("/+", "/", scope["path"]).rstrip("/") or "/"
            scope = {**scope, "path": re.sub(r"^(/v1)+(?=/v1/)", "", path)}
        await self._app(scope, receive, send)


class Refusal(Response):
    """An error in the form of the route's API."""

    def __init__(self, error: WireError, headers: Mapping[str, str]) -> None:
        super().__init__(status_code=error.status)
        self._error = error
        self._more = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response; closes the connection if the body has not been read to its end."""
        await refuse(scope, send, self._error, not share_of(scope).whole, self._more)

"""An answer that is sent while it is generated, as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Generic, Protocol, TypeVar

from starlette.responses import Response

from phi4_mlx.server.apis.wire import WireError
from phi4_mlx.server.bodies import Receive, Scope, Send
from phi4_mlx.server.disconnect import ClientGone, unless_gone
from phi4_mlx.server.request_log import Entry, entry_of

HEARTBEAT_S = 10.0  # a proxy closes a stream that is silent for too long

Item = TypeVar("Item")
Given = TypeVar("Given", contravariant=True)


class Events(Protocol[Given]):
    """Formats the items of a stream; see `Answer`."""

    @property
    def heartbeat(self) -> bytes: ...
    def opening(self) -> bytes: ...
    def chunk(self, item: Given, /) -> bytes: ...
    def closing(self) -> bytes: ...
    def failure(self, error: WireError) -> bytes: ...


class EventStream(Response, Generic[Item]):
    """An answer that is sent while it is generated; it ends when the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, answer: Events[Item], first: Item | None, rest: AsyncGenerator[Item | None, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._answer, self._first, self._rest = answer, first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        entry = entry_of(scope)
        try:
            await unless_gone(receive, self._send(send, entry))
        except ClientGone:
            entry.cancelled = True

    async def _send(self, send: Send, entry: Entry) -> None:
        async def write(events: bytes, more: bool = True) -> None:
            if events or not more:
                await send({"type": "http.response.body", "body": events, "more_body": more})

        answer = self._answer
        async with contextlib.aclosing(self._rest):
            try:
                await write(answer.opening() + self._events(self._first))
                async for item in self._rest:
                    await write(self._events(item))
                end = answer.closing()
            except Exception as error:
                entry.error = (
                    error
                    if isinstance(error, WireError)
                    else WireError(500, f"the server could not continue: {type(error).__name__}")
                )
                end = answer.failure(entry.error)
            await write(end, more=False)

    def _events(self, item: Item | None) -> bytes:
        return self._answer.heartbeat if item is None else self._answer.chunk(item)


async def paced(items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item | None, None]:
    """The items, with None after each `HEARTBEAT_S` seconds without one."""
    pending: asyncio.Future[Item] | None = None
    async with contextlib.aclosing(items):
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(items))
                await asyncio.wait([pending], timeout=HEARTBEAT_S)
                if not pending.done():
                    yield None
                    continue
                try:
                    item = pending.result()
                except StopAsyncIteration:
                    return
                pending = None
                yield item
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)


async def collected(items: AsyncGenerator[Item, None]) -> list[Item]:
    """All items."""
    async with contextlib.aclosing(items):
        return [item async for item in items]

"""One line in the log for each request: who asked for what, how it ended and how long it took.

A line never contains text of prompts or answers, nor a key: of a path the query is left out, and a refusal's message
loses what it quotes of the body.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phi4_mlx.server.apis.wire import Ask, Delta, End, Usage, WireError
from phi4_mlx.server.log import LOG

CANCELLED = 499  # a status that is never sent: the client has disconnected
PATH_CHARS = 200
REASON_CHARS = 300
_POLLED = ("/health", "/metrics", "/page/")  # asked for each second, or many at a time
_ENTRY = "phi4_mlx.log_entry"  # in the scope of a request
# A quoted value; one of 100 characters may have been cut before its end, and everything behind it counts as quoted.
_QUOTED = re.compile(r"""(?<!\w)b?(?:'(?:[^'\\]|\\.){0,97}'|"(?:[^"\\]|\\.){0,97}"|['"].*)""", re.DOTALL)
_PLAIN = re.compile(r"[\w./:@+,-]+", re.ASCII)


@dataclass
class Entry:
    """The facts of one request, for its line.

    Attributes:
        ask: the request; None if it is not for an answer.
        status: of the response; 0 if none was begun.
        prompt_tokens: tokens of all prompts; None if they are not known.
        first_s: seconds from the request to the first text or call of its answer; None without one.
        ends: of the answers.
        ignored: what had no effect on the answer.
        tool: the name of the server's tool that was called.
        tool_failed: True if its result is an error for the model.
        error: the refusal, or the failure of an answer that had begun.
        cancelled: True if the client disconnected before the end.
    """

    ask: Ask | None = None
    status: int = 0
    prompt_tokens: int | None = None
    first_s: float | None = None
    ends: list[End] = field(default_factory=list)
    ignored: str = ""
    tool: str = ""
    tool_failed: bool = False
    error: WireError | None = None
    cancelled: bool = False
    _start: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """The time since the request."""
        return time.monotonic() - self._start

    async def observed(self, items: AsyncGenerator[Delta | End, None]) -> AsyncGenerator[Delta | End, None]:
        """The items of an answer, which are noted as they pass."""
        async with contextlib.aclosing(items):
            async for item in items:
                if isinstance(item, End):
                    self.ends.append(item)
                elif self.first_s is None:
                    self.first_s = self.seconds
                yield item

    def facts(self) -> Iterator[tuple[str, str]]:
        """The names and values of a line."""
        yield "total_s", f"{self.seconds:.3f}"
        if self.ask is not None:
            yield "model", self.ask.model
            yield "stream", "yes" if self.ask.stream else "no"
            usage = Usage.of(self.ends, self.ask.n)
            if self.prompt_tokens is not None:
                yield "prompt_tokens", str(self.prompt_tokens)
            if self.ends:
                yield "cached_tokens", str(usage.cached_tokens)
                yield "answer_tokens", str(usage.answer_tokens)
            if self.first_s is not None:
                yield "first_s", f"{self.first_s:.3f}"
        if self.tool:
            yield "tool", self.tool
            if self.tool_failed:
                yield "tool_failed", "yes"
        reasons = ["cancelled"] if self.cancelled else dict.fromkeys(end.reason for end in self.ends)
        if reasons:
            yield "finish", ",".join(reasons)
        if self.ignored:
            yield "ignored", self.ignored
        if self.error is not None:
            yield "error", _reason(self.error)


def entry_of(scope: Scope) -> Entry:
    """The entry of a request; one that is never written, if there is no log."""
    entry = scope.get(_ENTRY)
    return entry if isinstance(entry, Entry) else Entry()


class RequestLog:
    """ASGI middleware that logs a line for each request.

    Args:
        app: the other application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        entry = scope[_ENTRY] = Entry()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            write(scope, entry)


def write(scope: Scope, entry: Entry) -> None:
    """Writes the line of a request."""
    status, level = entry.status if entry.error is None else entry.error.status, logging.INFO
    if scope["path"].startswith(_POLLED) and entry.error is None:
        level = logging.DEBUG
    elif status >= 500:
        level = logging.ERROR
    elif status >= 400 and status != CANCELLED:
        level = logging.WARNING
    if LOG.isEnabledFor(level):
        where = f"{_client(scope)} {_token(scope['method'])} {_path(scope)} {entry.status or '-'}"
        LOG.log(level, "%s %s", where, " ".join(f"{name}={_token(value)}" for name, value in entry.facts()))


def write_refusal(client: tuple[str, int] | None, error: WireError) -> None:
    """Writes the line of a connection that was refused before its request was read."""
    LOG.warning("%s - - %s error=%s", _client({"client": client}), error.status, _token(_reason(error)))


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return _token(client[0]) if client else "-"


def _path(scope: Scope) -> str:
    """The path without its query, in printable ASCII."""
    return quote(scope["path"][:PATH_CHARS], safe="/:@!$&'()*+,;=-._~", errors="replace")


def _reason(error: WireError) -> str:
    """The message of an error; of a malformed body, what it quotes may be someone's words, and is left out."""
    message = _QUOTED.sub("'...'", error.message) if error.status == 400 else error.message
    return message if len(message) <= REASON_CHARS else f"{message[:REASON_CHARS]}..."


def _token(value: str) -> str:
    """A value as one word, or as a JSON string."""
    return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)

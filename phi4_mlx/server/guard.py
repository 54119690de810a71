"""Checks of a request before the application sees it: host, origin, key, size and speed.

Any web page that a user visits can send requests to a server on loopback. So the guard checks the Host and the Origin
of a request, and requires the content type JSON, which a page of another origin cannot send without a preflight.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import math
import resource
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from phi4_mlx.server.apis import messages as messages_api
from phi4_mlx.server.apis.wire import WireError, error_body, json_bytes
from phi4_mlx.server.bodies import SHARE, Bodies, Headers, Message, Receive, Scope, Send, Share, metered, whole_body
from phi4_mlx.server.limits import (
    HEADER_BYTES,
    REQUEST_S,
    SMALL_BODY_BYTES,
    SPARE_DESCRIPTORS,
    STOPPING_WRITE_S,
    WRITE_BYTES,
    WRITE_S,
)
from phi4_mlx.server.request_log import entry_of, write_refusal

UPLOAD_PATHS = ("/v1/audio/transcriptions", "/v1/audio/translations")
PAGE_FILES = "/page/"  # the path of the files of the chat page
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """True if only this machine can reach an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


@dataclass(frozen=True)
class Guard:
    """An ASGI application that checks requests and passes them to another.

    Attributes:
        app: the other application.
        api_key: the key that a client must send; None if no key is needed.
        hosts: the accepted values of the Host header, without a port; None accepts any, which is safe with a key.
        origins: origins of web pages that may send requests, in addition to the server's own; "*" is any.
        bodies: the room for bodies.
    """

    app: Callable[[Scope, Receive, Send], Awaitable[None]]
    api_key: str | None
    hosts: tuple[str, ...] | None
    origins: tuple[str, ...] = ()
    bodies: Bodies = field(default_factory=Bodies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        send = self._with_origin(_in_slices(send), headers.get("origin"))
        with self.bodies.share() as share:
            scope[SHARE] = share
            try:
                _check_size(scope)
                self._check_sender(scope, headers)
                if scope["method"] == "OPTIONS" and "origin" in headers:
                    return await _answer(send, 204, b"", _PREFLIGHT)
                self._check_key(scope, headers)
                if _is_upload(scope, headers):
                    replay = metered(headers, receive, share)
                else:
                    replay = _replay(await _read_body(scope, headers, receive, share), receive)
                    share.whole = True
            except WireError as error:
                close = error.status in (408, 413, 503) or _is_costly_to_skip(headers)
                return await refuse(scope, send, error, close)
            await self.app(scope, replay, send)

    def _check_sender(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts is not None and name.lower() not in self.hosts:
            names = " or ".join(dict.fromkeys(self.hosts))  # the host that is listened on may be one of the others
            raise WireError(403, f"the Host header is {name!r:.100}; this server accepts {names}")
        origin = headers.get("origin")
        if origin is None or origin in self.origins or "*" in self.origins:
            return
        if host_of(origin) != host.lower():
            raise WireError(403, f"pages of {origin!r:.100} may not send requests; --allowed-origins can allow them")

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if self.api_key is None or _is_open(scope):
            return
        given = [headers.get("x-api-key", "").encode("latin-1")]  # the client's bytes
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given.append(value.strip().encode("latin-1"))
        wanted = self.api_key.encode()
        matches = [hmac.compare_digest(each, wanted) for each in given]  # every one: the timing reveals nothing
        if not any(matches):
            message = "a key is required: Authorization: Bearer KEY, or x-api-key: KEY"
            raise WireError(401, message, code="invalid_api_key")

    def _with_origin(self, send: Send, origin: str | None) -> Send:
        """A `send` with the headers that let a page of an allowed origin read the response."""
        if origin is None or not (origin in self.origins or "*" in self.origins):
            return send

        async def send_with_origin(message: Message) -> None:
            if message["type"] == "http.response.start":
                allowed = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
                message = {**message, "headers": [*message.get("headers", []), *allowed]}
            await send(message)

        return send_with_origin


_PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, *"),  # client libraries send many headers of their own
    (b"access-control-max-age", b"600"),
]


def _is_open(scope: Scope) -> bool:
    """True for paths without a key: the engine's state, and the files of the page, which asks for the key itself."""
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in ("/", "/health") or path.startswith(PAGE_FILES))


def host_of(origin: str) -> str | None:
    """The host and port of an origin, in lower case; None if it has none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _check_size(scope: Scope) -> None:
    """Refuses large headers; h11 checks its own limit only while they are incomplete."""
    size = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > HEADER_BYTES:
        raise WireError(431, f"the headers are {size:,} bytes; the limit is {HEADER_BYTES:,}")


async def _read_body(scope: Scope, headers: Headers, receive: Receive, share: Share) -> bytes:
    """The whole body; empty for a method without one.

    Raises:
        WireError: the body is not JSON, is too large, takes too long, or has no room.
    """
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return b""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise WireError(415, f"content-type is {kind!r:.100}; it must be application/json")
    with contextlib.suppress(ValueError):
        if int(headers.get("content-length", "0")) > share.limit:
            raise WireError(413, f"the body is {headers['content-length']} bytes; the limit is {share.limit}")
    try:
        return await asyncio.wait_for(whole_body(receive, share), REQUEST_S)
    except asyncio.TimeoutError:
        raise WireError(408, f"the body did not arrive within {REQUEST_S:g} s") from None


def _is_upload(scope: Scope, headers: Headers) -> bool:
    """True for a form with a file, which its route reads as it arrives; only after the checks of its sender."""
    is_form = headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"
    return is_form and scope["method"] == "POST" and scope["path"].rstrip("/").endswith(UPLOAD_PATHS)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body first, and then the later messages, such as the disconnect."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def _is_costly_to_skip(headers: Headers) -> bool:
    """True if the unread body is large, or may never come: then no further request can be read behind it."""
    length = headers.get("content-length", "0")
    small = length.isdigit() and len(length) < 10 and int(length) <= SMALL_BODY_BYTES
    return "expect" in headers or "transfer-encoding" in headers or not small


def _in_slices(send: Send) -> Send:
    """A `send` that waits while the client does not read, so that a large response is not copied as a whole."""

    async def send_in_slices(message: Message) -> None:
        body = message.get("body", b"")
        if len(body) <= WRITE_BYTES:
            return await send(message)
        for start in range(0, len(body), WRITE_BYTES):
            last = start + WRITE_BYTES >= len(body)
            part = body[start : start + WRITE_BYTES]
            await send({**message, "body": part, "more_body": not last or message.get("more_body", False)})

    return send_in_slices


async def refuse(
    scope: Scope, send: Send, error: WireError, close: bool = False, more: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Sends an error in the form of the route's API, with `more` headers; closes the connection if asked to."""
    entry_of(scope).error = error
    make_body = messages_api.error_body if scope["path"].startswith("/v1/messages") else error_body
    headers = [(b"content-type", b"application/json")]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))  # never Basic, for which a browser would ask by itself
    if error.status in (429, 503):
        headers.append((b"retry-after", b"2"))
    if close:  # the rest of the body stays unread
        headers.append((b"connection", b"close"))
    await _answer(send, error.status, json_bytes(make_body(error)), [*headers, *more])


async def _answer(send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with time limits for the headers of a request and for reading the response."""

    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _stopping = False

    def connection_made(self, transport: Any) -> None:
        """Starts the timer for the headers; refuses a connection that takes one of the last descriptors."""
        super().connection_made(transport)
        # The system would take megabytes from a client that does not read.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, WRITE_BYTES)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of every unsent byte
        if len(self.connections) > _connections_limit():
            self._refuse(WireError(503, "the server has too many connections; connect again in a moment"))
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        """Stops the timer once the headers are complete, and starts it for the next request."""
        super().data_received(data)
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timers."""
        self._stop_timer()
        self.resume_writing()
        self._unset_keepalive_if_required()  # uvicorn forgets it after a reset
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Starts the timer for the client to read."""
        super().pause_writing()
        seconds = STOPPING_WRITE_S if self._stopping else WRITE_S
        self._write_timer = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stops the timer: the client has read everything."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def shutdown(self) -> None:
        """Ends the connection, but for a client that has sent its whole request and reads the answer."""
        super().shutdown()
        self._stopping = True
        if self._write_timer is not None:
            self._write_timer.cancel()
            self.pause_writing()
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_started:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answers invalid HTTP in JSON; uvicorn would send plain text."""
        self._refuse(WireError(400, msg))

    def _refuse(self, error: WireError) -> None:
        write_refusal(self.client, error)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [("content-type", "application/json"), ("connection", "close")]
            headers += [("retry-after", "2")] * (error.status == 503)
            body = h11.Data(data=json_bytes(error_body(error)))
            for event in (h11.Response(status_code=error.status, headers=headers), body, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _update_timer(self) -> None:
        waiting = self.cycle is None or self.cycle.response_complete  # for the headers of a request
        if not waiting:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _connections_limit() -> float:
    """Connections that leave descriptors for a new engine; read each time, because the limit can change."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if limit == resource.RLIM_INFINITY else max(8, limit - SPARE_DESCRIPTORS)

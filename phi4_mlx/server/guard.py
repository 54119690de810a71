"""What comes from outside is held to limits before anything else looks at it: who asks, whence, how much, how slowly.

A web page that somebody visits can reach a server on loopback. So the Host and the Origin of a request are checked, and
a body must say that it is JSON: a page of another origin cannot send that without being asked about it first.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from phi4_mlx.server.apis import messages as messages_api
from phi4_mlx.server.apis.wire import WireError, error_body, json_bytes

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

BODY_BYTES = 16 * 2**20
HEADER_BYTES = 32 * 2**10
REQUEST_S = 30.0  # to send the headers, and again to send the body

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


@dataclass(frozen=True)
class Guard:
    """An ASGI application before another.

    Attributes:
        app: the other.
        api_key: what a client must know; None asks for none.
        hosts: names under which the server may be addressed; None for any, as where a key keeps strangers out.
        origins: web pages of these origins may ask too, besides the server's own.
    """

    app: Callable[[Scope, Receive, Send], Awaitable[None]]
    api_key: str | None
    hosts: tuple[str, ...] | None
    origins: tuple[str, ...] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        send = self._with_origin(send, headers.get("origin"))
        try:
            _check_size(scope)
            self._check_sender(scope, headers)
            if scope["method"] == "OPTIONS" and "origin" in headers:
                return await _answer(send, 204, b"", _PREFLIGHT)
            self._check_key(scope, headers)
            body = await _read_body(scope, headers, receive)
        except WireError as error:
            return await refuse(scope, send, error)
        await self.app(scope, _replay(body, receive), send)

    def _check_sender(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts is not None and name.lower() not in self.hosts:
            raise WireError(403, f"this server is not called {name!r:.100}; it is called {' or '.join(self.hosts)}")
        origin = headers.get("origin")
        if origin is None or origin in self.origins or "*" in self.origins:
            return
        if _host_of(origin) != host.lower():
            raise WireError(403, f"pages of {origin!r:.100} may not ask; --allowed-origins would let them")

    def _check_key(self, scope: Scope, headers: dict[str, str]) -> None:
        if self.api_key is None or scope["path"] == "/health":
            return
        given = [headers.get("x-api-key", "").encode("latin-1")]  # the bytes as they came
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given.append(value.strip().encode("latin-1"))
        elif scheme.lower() == "basic":  # what a browser asks for; the user's name does not matter
            with contextlib.suppress(ValueError):
                given.append(base64.b64decode(value).partition(b":")[2])
        wanted = self.api_key.encode()
        if not any([hmac.compare_digest(each, wanted) for each in given]):  # noqa: C419
            message = "a key is needed: Authorization: Bearer KEY, or x-api-key: KEY"
            raise WireError(401, message, code="invalid_api_key")

    def _with_origin(self, send: Send, origin: str | None) -> Send:
        """Lets a page of an allowed origin read the answer."""
        if origin is None or not (origin in self.origins or "*" in self.origins):
            return send

        async def send_with_origin(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                allowed = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
                message = {**message, "headers": [*message.get("headers", []), *allowed]}
            await send(message)

        return send_with_origin


_PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, *"),  # clients send many that tell of themselves
    (b"access-control-max-age", b"600"),
]


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _check_size(scope: Scope) -> None:
    """Refuses headers that came at one go, and so fast that the protocol's own limit did not see them."""
    size = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > HEADER_BYTES:
        raise WireError(431, f"the headers have {size:,} bytes; the limit is {HEADER_BYTES:,}")


async def _read_body(scope: Scope, headers: dict[str, str], receive: Receive) -> bytes:
    """The whole body of a request that has one.

    Raises:
        WireError: it is not JSON, too large, or too slow to come.
    """
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return b""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise WireError(415, f"content-type is {kind!r:.100}; it must be application/json")
    with contextlib.suppress(ValueError):
        if int(headers.get("content-length", "0")) > BODY_BYTES:
            raise WireError(413, f"the body has {headers['content-length']} bytes; the limit is {BODY_BYTES}")
    try:
        return await asyncio.wait_for(_whole(receive), REQUEST_S)
    except asyncio.TimeoutError:
        raise WireError(408, f"the body has not come within {REQUEST_S:g} s") from None


async def _whole(receive: Receive) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise WireError(400, "the body was cut off")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > BODY_BYTES:
            raise WireError(413, f"the body has more than {BODY_BYTES} bytes, which is the limit")
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the application a body that was read already, and then what comes: that the client has left."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return pending.pop() if pending else await receive()

    return replay


async def refuse(scope: Scope, send: Send, error: WireError) -> None:
    """Answers with an error in the shape of the API that was asked."""
    shape = messages_api.error_body if scope["path"].startswith("/v1/messages") else error_body
    headers = [(b"content-type", b"application/json")]
    if error.status == 401:
        page = scope["path"] == "/"
        headers.append((b"www-authenticate", b'Basic realm="phi4_mlx", charset="UTF-8"' if page else b"Bearer"))
    if error.status in (429, 503):
        headers.append((b"retry-after", b"2"))
    if error.status in (408, 413):  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    await _answer(send, error.status, json_bytes(shape(error)), headers)


async def _answer(send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, but whoever takes too long to send a request's headers is cut off."""

    _slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts the clock."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Stops the clock once the headers are there, and starts it when more comes after an answer."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        self._stop_watching()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, in JSON as all else; uvicorn would in plain text."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [("content-type", "application/json"), ("connection", "close")]
            body = h11.Data(data=json_bytes(error_body(WireError(400, msg))))
            for event in (h11.Response(status_code=400, headers=headers), body, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        waiting = self.cycle is None or self.cycle.response_complete
        if not waiting:
            self._stop_watching()
        elif self._slow is None:
            self._slow = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _stop_watching(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

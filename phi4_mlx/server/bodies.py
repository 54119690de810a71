"""The room that requests take: for their bodies, for the media decoded from them, and for forms on the disk."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any

from phi4_mlx.server.apis.wire import WireError
from phi4_mlx.server.limits import (
    BODIES,
    BODY_BYTES,
    MEDIA_BYTES,
    SMALL_BODY_BYTES,
    UPLOAD_BYTES,
    UPLOAD_S,
    UPLOADS_LIMIT,
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Mapping[str, str]  # names in lower case

SHARE = "phi4_mlx.share"  # in the scope of a request


class Share:
    """The bytes of one request: of its body, and of the pictures and sounds decoded from it.

    Args:
        bodies: the room that it takes them from.

    Attributes:
        size: bytes of the body so far.
        whole: True once the body has been read to its end.
    """

    def __init__(self, bodies: Bodies) -> None:
        self._bodies, self.size, self._held, self._uploads = bodies, 0, 0, 0
        self.whole = False

    @property
    def limit(self) -> int:
        """The most bytes of the body."""
        return self._bodies.limit

    def take(self, size: int) -> None:
        """Counts more bytes of the body.

        Raises:
            WireError: the body is too large, or the larger bodies of all requests are.
        """
        before, self.size = self.size, self.size + size
        if self.size > SMALL_BODY_BYTES:
            self._bodies.used += size if before > SMALL_BODY_BYTES else self.size
            limit = self.limit
            if self.size > limit:
                raise WireError(413, f"the body is over the limit of {limit} bytes")
            if self._bodies.used > BODIES * limit:
                message = (
                    f"the bodies of all requests are over {BODIES * limit} bytes; send the request again in a moment"
                )
                raise WireError(503, message)

    def hold(self, size: int) -> None:
        """Counts the bytes of a decoded picture or sound.

        Raises:
            WireError: those of all requests are too many.
        """
        self._held += size
        self._bodies.held += size
        if self._bodies.held > MEDIA_BYTES:
            message = f"the decoded media of all requests are over {MEDIA_BYTES} bytes; send fewer, or smaller ones"
            raise WireError(503, f"{message}, or send the request again in a moment")

    def upload(self) -> None:
        """Counts a form whose file goes to the disk.

        Raises:
            WireError: there are too many at a time.
        """
        if self._bodies.uploads >= UPLOADS_LIMIT:
            raise WireError(503, f"{UPLOADS_LIMIT} other files are being transcribed; send the request again later")
        self._uploads += 1
        self._bodies.uploads += 1

    def free(self) -> None:
        """Gives everything back."""
        self._bodies.uploads -= self._uploads
        if self.size > SMALL_BODY_BYTES:
            self._bodies.used -= self.size
        self._bodies.held -= self._held


class Bodies:
    """The room for the bodies of all requests.

    Args:
        limit: the most bytes of one body.

    Attributes:
        used: bytes of the bodies over `SMALL_BODY_BYTES`.
        held: bytes of decoded pictures and sounds.
        uploads: forms whose files are on the disk.
    """

    def __init__(self, limit: int = BODY_BYTES) -> None:
        self.limit, self.used, self.held, self.uploads = limit, 0, 0, 0

    @contextlib.contextmanager
    def share(self) -> Iterator[Share]:
        """The share of one request, which is free again at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            share.free()


def share_of(scope: Scope) -> Share:
    """The share of a request, which the guard has put into its scope."""
    share = scope[SHARE]
    assert isinstance(share, Share)
    return share


async def whole_body(receive: Receive, share: Share) -> bytes:
    """A whole body, in memory.

    Raises:
        WireError: it is too large, has no room, or the client disconnects.
    """
    body = bytearray()  # one block, which goes back to the system as a whole
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise WireError(400, "the client disconnected before the end of the body")
            share.take(len(message.get("body", b"")))
            body += message.get("body", b"")
            if not message.get("more_body"):
                return bytes(body)
    finally:
        body.clear()  # the traceback of an exception keeps this frame alive


def metered(headers: Headers, receive: Receive, share: Share) -> Receive:
    """A `receive` that refuses a form which is too large or too slow.

    Raises:
        WireError: the length that the client states is too large.
    """
    with contextlib.suppress(ValueError):
        if int(headers.get("content-length", "0")) > UPLOAD_BYTES:
            raise WireError(413, f"the form is {headers['content-length']} bytes; the limit is {UPLOAD_BYTES}")
    ends_at, size = asyncio.get_running_loop().time() + UPLOAD_S, 0

    async def within_limits() -> Message:
        nonlocal size
        if share.whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, ends_at - asyncio.get_running_loop().time()))
        except asyncio.TimeoutError:
            raise WireError(408, f"the form did not arrive within {UPLOAD_S:g} s") from None
        if message["type"] == "http.disconnect":
            raise WireError(400, "the client disconnected before the end of the body")
        size += len(message.get("body", b""))
        if size > UPLOAD_BYTES:
            raise WireError(413, f"the form is over the limit of {UPLOAD_BYTES} bytes")
        share.whole = not message.get("more_body")
        return message

    return within_limits

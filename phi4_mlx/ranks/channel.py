"""JSON values over a TCP connection: four bytes of length, most significant first, then UTF-8. Never pickle."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

JSON = Any  # plain values: None, bool, int, float, str, and lists and objects of them

MOST_BYTES = 2**26
"""Limit of a command: the ids of 128K tokens have 1 MB."""

HELLO_BYTES = 2**20
"""Limit of a message of the handshake, before the other side is known."""


class Channel:
    """One connection to another rank. One thread may send while another receives."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # commands may pause for hours

    def send(self, value: JSON, most: int = MOST_BYTES) -> None:
        """Sends a value; waits until the connection has taken it.

        Args:
            value: plain values; NaN and infinity are refused.
            most: the most bytes of its JSON.

        Raises:
            OSError: the connection is lost.
            ValueError: the value is not plain, or has more than `most` bytes.
        """
        data = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
        if len(data) > most:
            raise ValueError(f"a message of {len(data):,} bytes between ranks exceeds the limit of {most:,}")
        self._socket.sendall(len(data).to_bytes(4, "big") + data)

    def receive(self, timeout_s: float | None = None, most: int = MOST_BYTES) -> JSON:
        """Waits for a value.

        Args:
            timeout_s: seconds without a byte after which it gives up; None for no limit.
            most: the most bytes that a message may have.

        Raises:
            OSError: the connection is lost or closed, or the time is over (TimeoutError).
            ValueError: what came is not a message.
        """
        self._socket.settimeout(timeout_s)
        try:
            length = int.from_bytes(self._exactly(4), "big")
            if length > most:
                raise ValueError(f"a message of {length:,} bytes exceeds the limit of {most:,}")
            return json.loads(self._exactly(length))
        except RecursionError:
            raise ValueError("a message is nested too deep") from None
        finally:
            with contextlib.suppress(OSError):
                self._socket.settimeout(None)

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(min(count - len(data), 2**20))
            if not part:
                raise ConnectionError("the connection was closed")
            data += part
        return bytes(data)

    def detach(self) -> socket.socket:
        """The socket itself, for another owner."""
        return self._socket

    def close(self) -> None:
        """Closes the connection, after what was sent has gone."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

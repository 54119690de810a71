"""JSON values over a connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from phi4_mlx.ranks.channel import JSON, Channel


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and the socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    yield Channel(near), far
    near.close()
    far.close()


@pytest.mark.parametrize("value", [None, {"ids": [1, 2], "text": "é\n😀"}, [True, 0.5, -7], "", list(range(200_000))])
def test_a_value_comes_as_it_was_sent(pair: tuple[Channel, socket.socket], value: JSON) -> None:
    sender = threading.Thread(target=pair[0].send, args=(value,))
    sender.start()
    assert Channel(pair[1]).receive(10) == value
    sender.join()


def test_values_come_in_order_and_apart(pair: tuple[Channel, socket.socket]) -> None:
    for number in range(3):
        pair[0].send({"number": number})
    other = Channel(pair[1])
    assert [other.receive(10)["number"] for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}, {1, 2}, b"bytes", object()])
def test_what_is_not_plain_is_refused(pair: tuple[Channel, socket.socket], value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        pair[0].send(value)


def test_a_message_beyond_the_limit_is_refused_on_both_sides(pair: tuple[Channel, socket.socket]) -> None:
    with pytest.raises(ValueError, match="102 bytes between ranks exceeds the limit of 101"):
        pair[0].send("x" * 100, 101)
    pair[1].sendall((2**31).to_bytes(4, "big"))
    with pytest.raises(ValueError, match="exceeds the limit"):
        pair[0].receive(10)


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[" * 100_000, b""])
def test_what_is_not_json_is_refused(pair: tuple[Channel, socket.socket], data: bytes) -> None:
    pair[1].sendall(len(data).to_bytes(4, "big") + data)
    with pytest.raises(ValueError):
        pair[0].receive(10)


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\0\5ab"])
def test_a_closed_connection_is_an_error(pair: tuple[Channel, socket.socket], sent: bytes) -> None:
    pair[1].sendall(sent)
    pair[1].close()
    with pytest.raises(ConnectionError):
        pair[0].receive(10)


def test_silence_is_an_error_after_the_time_given(pair: tuple[Channel, socket.socket]) -> None:
    with pytest.raises(TimeoutError):
        pair[0].receive(0.05)

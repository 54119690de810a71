"""The server's command line: addresses and keys."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.server import __main__ as command


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1"])
def test_serving_other_machines_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv(command.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(command, "open_listener", lambda *_: pytest.fail("it would listen"))
    assert command.main(["--host", host, "--port", "0", "--model", "demo"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "--api-key" in line and host in line

    def listening(*_: Any) -> Any:
        raise RequestError("listening")

    monkeypatch.setattr(command, "open_listener", listening)
    monkeypatch.setenv(command.KEY_VARIABLE, "k")
    assert command.main(["--host", host, "--port", "0", "--model", "demo"]) == 2
    assert "listening" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["\udcff", "k\udc80y", "two\nlines", " k", "k ", "\x7f", "a\tb"])
@pytest.mark.parametrize("source", ["option", "variable"])
def test_a_key_that_no_client_can_send_is_refused(
    key: str, source: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(command, "open_listener", lambda *_: pytest.fail("it would listen"))
    monkeypatch.delenv(command.KEY_VARIABLE, raising=False)
    words = ["--port", "0", "--model", "demo"]
    if source == "variable":
        monkeypatch.setenv(command.KEY_VARIABLE, key)
    assert command.main([*words, *(["--api-key", key] if source == "option" else [])]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "UTF-8" in line and line.removesuffix("\n").isprintable()


@pytest.mark.parametrize(
    "host", ["x" * 300, "a..b", "no.such.name.invalid", "127.0.0.1:80", "[::1", "1.2.3.4.5", "\xe4"]
)
def test_an_address_that_is_none_is_one_line(host: str) -> None:
    with pytest.raises(RequestError, match="choose another --host") as raised:
        command.open_listener(host, 0)
    assert len(str(raised.value)) < 300 and "\n" not in str(raised.value)


def test_an_address_in_use_is_one_line() -> None:
    with command.open_listener("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with command.open_listener("127.0.0.1", port) as second:  # as long as neither listens
            command.listen(first, 5)
            with pytest.raises(RequestError, match=f"127.0.0.1:{port}.*choose another --port"):
                command.listen(second, 5)
        with pytest.raises(RequestError, match="choose another --port"):
            command.open_listener("127.0.0.1", port)


def test_small_writes_are_sent_at_once() -> None:
    """With Nagle's algorithm, an answer in two writes waits 40 ms for the client's delayed acknowledgement."""

    async def main() -> int:
        loop = asyncio.get_running_loop()
        connected: asyncio.Future[int] = loop.create_future()

        class Accepted(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                connection = transport.get_extra_info("socket")
                connected.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        with command.open_listener("127.0.0.1", 0) as listener:
            server = await loop.create_server(Accepted, sock=listener)
            with socket.create_connection(listener.getsockname()):
                no_delay = await connected
            server.close()
        return no_delay

    assert asyncio.run(main())


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "http://127.0.0.1:{port}"),
        ("0.0.0.0", "all addresses, here http://127.0.0.1:{port}"),  # no browser opens http://0.0.0.0
        ("::1", "http://[::1]:{port}"),
        ("::", "all addresses, here http://[::1]:{port}"),
    ],
)
def test_the_address_of_the_page_can_be_opened(host: str, shown: str) -> None:
    try:
        listener = command.open_listener(host, 0)
    except RequestError:
        pytest.skip(f"this machine has no address {host}")
    with listener:
        assert command.page_address(listener) == shown.format(port=listener.getsockname()[1])


def test_the_key_is_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools and MCP servers inherit the environment."""
    monkeypatch.setenv(command.KEY_VARIABLE, "s3cret")
    assert command.api_key(None) == "s3cret" and command.KEY_VARIABLE not in os.environ
    monkeypatch.setenv(command.KEY_VARIABLE, "s3cret")
    assert command.api_key("other") == "other" and command.KEY_VARIABLE not in os.environ

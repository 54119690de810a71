"""Attacks on a server's resources: after each, it answers with its memory and descriptors of before, or has ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT
from tests.e2e.server_process import ENDLESS, HANG_S, Server, alive, answer_on, chat, send, serving, until
from tests.e2e.test_server_load import resident_bytes

QUICK = (
    "from phi4_mlx.server import http_server; from phi4_mlx.server.engine import process, supervisor; "
    "guard.WRITE_S = 1.5; http_server.TIDY_S = 1; http_server.GRACE_S = 5.0; process.FROZEN_S = 4.0; "
    "supervisor.RESTART_S = 1.0; supervisor.PAUSES_S = (0.0, 0.2); "
)
CLIENTS = 30
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and sets the limits of another process")


def descriptors(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def deaf(server: Server) -> socket.socket:
    """A connection with a small buffer, so that a client that does not read is noticed soon."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(HANG_S)
    connection.connect(("127.0.0.1", server.port))
    return connection


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(request_s=2.0, more=QUICK) as it:
        for stream in (True, False) * 5:
            assert it.ask(stream=stream, logprobs=True).status_code == 200
        yield it
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(HANG_S) == 0
    assert not any("Traceback" in line for line in it.lines), "".join(it.lines)[-3000:]
    assert len([line for line in it.lines if " 127.0.0.1 " not in line]) < 40  # beside the lines of requests


def check_recovery(server: Server, memory: int, opened: int) -> None:
    """Waits until memory and descriptors are those of before, and a request is answered."""
    until(lambda: descriptors(server) <= opened and server.get("/health").json()["jobs"] == 0)
    until(lambda: resident_bytes(server.process.pid) < 1.1 * memory)  # 5 MB: Python keeps some blocks
    assert server.ask().status_code == 200


@linux
def test_clients_that_never_read_a_stream_are_cut_off(server: Server) -> None:
    memory, opened = resident_bytes(server.process.pid), descriptors(server)
    body = json.dumps(chat(stream=True, logprobs=True, top_logprobs=20, **(ENDLESS | {"max_tokens": 2000})))
    connections = [deaf(server) for _ in range(CLIENTS)]
    for connection in connections:
        send(connection, "/v1/chat/completions", body)
    until(lambda: server.metrics()["jobs"] == CLIENTS)  # counted until they are gone
    check_recovery(server, memory, opened)
    for connection in connections:
        connection.close()


@linux
def test_clients_that_never_read_whole_responses_are_cut_off(server: Server) -> None:
    server.get("/")
    memory, opened = resident_bytes(server.process.pid), descriptors(server)
    connections = [deaf(server) for _ in range(CLIENTS)]
    for connection in connections:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 200)
    until(lambda: descriptors(server) > opened)
    check_recovery(server, memory, opened)
    for connection in connections:
        connection.close()


@linux
def test_unfinished_bodies_have_a_limit_together(server: Server) -> None:
    memory, opened = resident_bytes(server.process.pid), descriptors(server)
    half, connections, most = b" " * (8 * 2**20), [], 0
    for _ in range(CLIENTS):
        connection = server.raw()
        connections.append(connection)
        with contextlib.suppress(ConnectionError):  # no room for it
            connection.sendall(HEAD + b"Content-Length: 16000000\r\n\r\n" + half)
        most = max(most, resident_bytes(server.process.pid))
        assert server.ask().status_code == 200  # a small body always has room
    assert most < memory + 3 * 64 * 2**20
    assert any(answer_on(connection).startswith(b"HTTP/1.1 503") for connection in connections)
    check_recovery(server, memory, opened)
    for connection in connections:
        connection.close()


@linux
@pytest.mark.parametrize("attack", ["silent", "half a header", "half a body", "no reader"])
def test_no_client_delays_the_end(attack: str) -> None:
    """The server ends long before the grace for running answers."""
    more = QUICK.replace("GRACE_S = 5.0", "GRACE_S = 1000.0")
    with serving(request_s=1000.0, more=more) as server:
        connections = [deaf(server) for _ in range(CLIENTS)]
        for connection in connections:
            if attack == "half a header":
                connection.sendall(HEAD)
            elif attack == "half a body":
                connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n" + b" " * 50_000)
            elif attack == "no reader":
                connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 200)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(HANG_S) == 0
        assert not any("Traceback" in line for line in server.lines)
        for connection in connections:
            connection.close()


def test_a_second_signal_cuts_running_answers() -> None:
    with serving(more=QUICK.replace("GRACE_S = 5.0", "GRACE_S = 1000.0")) as server:
        engine = server.engine
        with server.raw() as connection:
            send(connection, "/v1/chat/completions", json.dumps(chat(stream=True, **ENDLESS)))
            until(lambda: server.metrics()["drawn_tokens_total"] > 3)
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert server.process.poll() is None  # the answer goes on
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(HANG_S) == 130
        until(lambda: not alive(engine))
        assert not any("Traceback" in line for line in server.lines)


@linux
def test_a_lack_of_descriptors_is_one_warning_and_passes(server: Server) -> None:
    pid = server.process.pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (5, hard))  # all of these are in use
    with server.raw():
        os.kill(server.engine, signal.SIGKILL)
        until(lambda: any("cannot be started" in line for line in server.lines))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
        assert server.ask().status_code == 200
    assert sum("new connections wait" in line for line in server.lines) == 1
    assert server.get("/health").json()["status"] == "ok"


@linux
def test_connections_leave_descriptors_for_a_new_engine(server: Server) -> None:
    pid, opened = server.process.pid, descriptors(server)
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (100, hard))
    connections = [server.raw() for _ in range(100)]
    assert answer_on(connections[-1]).startswith(b"HTTP/1.1 503")
    os.kill(server.engine, signal.SIGKILL)
    for connection in connections:
        connection.close()
    assert server.ask().status_code == 200
    assert not any("cannot be started" in line for line in server.lines)
    until(lambda: descriptors(server) <= opened)


def test_a_frozen_engine_is_replaced(server: Server) -> None:
    frozen = server.engine
    os.kill(frozen, signal.SIGSTOP)
    assert server.ask().status_code == 200  # after a wait
    assert server.engine != frozen and not alive(frozen)
    assert server.get("/health").json() == {"status": "ok", "restarts": 1, "jobs": 0}


def test_a_killed_engine_leaves_nothing_behind(server: Server) -> None:
    opened = descriptors(server) if sys.platform == "linux" else 0
    for _ in range(3):
        os.kill(server.engine, signal.SIGKILL)
        assert server.ask().status_code == 200
    assert server.get("/health").json()["restarts"] == 3
    if sys.platform == "linux":
        until(lambda: descriptors(server) <= opened)


def test_a_model_that_is_gone_ends_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "phi4_mlx" / "demo", folder)
    with serving("--model", str(folder), more=QUICK) as server:
        (folder / "model.safetensors").unlink()
        os.kill(server.engine, signal.SIGKILL)
        assert server.process.wait(HANG_S) == 2
    assert not any("Traceback" in line for line in server.lines)
    assert "server: " in server.lines[-1] and "safetensors" in server.lines[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("delay_s", [0.0, 0.2, 0.5])
def test_a_signal_while_the_model_is_loaded_ends_both_processes(number: signal.Signals, delay_s: float) -> None:
    words = [sys.executable, "-m", "phi4_mlx.server", "--model", "demo", "--port", "0"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        assert "loading" in process.stderr.readline()
        time.sleep(delay_s)
        process.send_signal(number)
        rest = process.stderr.read()  # ends once the engine has closed it as well
        code = process.wait(HANG_S)
    assert code == {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert "Traceback" not in rest or number == signal.SIGKILL


def test_a_signal_while_the_engine_restarts_ends_the_server() -> None:
    with serving(more=QUICK) as server:
        os.kill(server.engine, signal.SIGKILL)
        until(lambda: server.get("/health").json()["status"] == "restarting")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(HANG_S) == 0
    assert not any("Traceback" in line for line in server.lines)


@pytest.mark.parametrize("extra", [b"2\r\n\r\n{}", b"2\r\nExpect: 100-continue\r\n\r\n", b"9999999\r\n\r\n{}"])
def test_a_refusal_before_the_body_leaves_no_garbage(extra: bytes) -> None:
    with serving("--api-key", "k", more=QUICK) as server:
        for path in (b"/v1/chat/completions", b"/health"):
            with server.raw() as connection:
                connection.sendall(HEAD.replace(b"/v1/chat/completions", path) + b"Content-Length: " + extra)
                time.sleep(0.5)
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
                answers = answer_on(connection)
            statuses = re.findall(rb"HTTP/1.1 (\d+)", answers)
            assert statuses == ([b"401", b"200"] if extra == b"2\r\n\r\n{}" else [b"401"])


def test_the_end_is_not_delayed_by_requests_that_wait() -> None:
    answers: list[int] = []
    with serving("--decode-concurrency", "1") as server:

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                answers.append(server.ask(**ENDLESS).status_code)

        for _ in range(4):
            threading.Thread(target=ask, daemon=True).start()
        until(lambda: server.metrics()["jobs"] == 4)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: answers == [503] * 3)
        assert server.process.poll() is None  # the answer under way goes on, until a second signal

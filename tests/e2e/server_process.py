"""The server as a process, for the tests that talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import ROOT

LAUNCH = "import sys; from phi4_mlx.server import guard; guard.REQUEST_S = {request_s}; {more}" \
    "from phi4_mlx.server.__main__ import main; sys.exit(main())"  # fmt: skip


class Server:
    """A server on a port of its own.

    Attributes:
        port: where it listens.
        process: it.
        lines: what it has said on standard error so far.
    """

    def __init__(self, *options: str, request_s: float = 30.0, more: str = "", env: dict[str, str] | None = None):
        code = LAUNCH.format(request_s=request_s, more=more)
        words = [sys.executable, "-c", code, "--model", "demo", "--port", "0", *options]
        path = os.pathsep.join([*(env or {}).get("PYTHONPATH", "").split(os.pathsep), str(ROOT)]).strip(os.pathsep)
        self.process = subprocess.Popen(
            words, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {}) | {"PYTHONPATH": path}
        )
        assert self.process.stderr is not None
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()
        assert self._ready.wait(60) and self.process.poll() is None, self.lines
        self.port = int(self.lines[-1].rpartition(":")[2])
        self.url = f"http://127.0.0.1:{self.port}"

    def _read(self, stream: Any) -> None:
        for line in stream:
            self.lines.append(line)
            if "listening on" in line:
                self._ready.set()
        self._ready.set()

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, **({"timeout": 30} | options))

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, **({"timeout": 60} | options))

    def ask(self, text: str = "Say hello.", **more: Any) -> httpx.Response:
        """A short chat completion."""
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"model": "demo", "messages": messages, "max_tokens": 4} | more)

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics").text.splitlines()
        return {name.removeprefix("phi4_mlx_"): float(value) for name, _, value in (it.rpartition(" ") for it in lines)}

    def raw(self, timeout_s: float = 10.0) -> socket.socket:
        """A connection, for what no client would send."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)

    @property
    def engine(self) -> int:
        """The process id of the engine."""
        words = ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="]
        listed = subprocess.run(words, capture_output=True, text=True, check=True)
        rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
        (pid,) = (int(pid) for pid, parent, words in rows if int(parent) == self.process.pid and "spawn_main" in words)
        return pid

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._reader.join(10)


@contextlib.contextmanager
def serving(*options: str, **more: Any) -> Iterator[Server]:
    server = Server(*options, **more)
    try:
        yield server
    finally:
        server.stop()


def until(what: Callable[[], Any], seconds: float = 5.0) -> float:
    """Waits until it is so; returns the seconds that it took."""
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < seconds, "it has not come to be so"
        time.sleep(0.02)
    return time.monotonic() - start


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of a stream's events, without its end."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def answer_on(connection: socket.socket) -> bytes:
    """All that comes until the other end closes, or says no more for as long as the connection waits."""
    parts: Sequence[bytes] = []
    with contextlib.suppress(ConnectionError, TimeoutError):
        while part := connection.recv(65536):
            parts = [*parts, part]
    return b"".join(parts)

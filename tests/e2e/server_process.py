"""The server as a process, and requests to it, for the tests of the server."""

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

HANG_S = 120.0  # whatever takes longer is stuck
LAUNCH = "import sys; from phi4_mlx.server import guard; guard.REQUEST_S = {request_s}; {more}" \
    "from phi4_mlx.server.__main__ import main; sys.exit(main())"  # fmt: skip


HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ENDLESS: dict[str, Any] = {"logit_bias": {"1000": -100, "1003": -100}, "max_tokens": 3000}  # no end marker
AUDIT = """
import os, sys

def hook(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        with open(os.environ["AUDIT_LOG"], "a") as file:
            print(event, args[1:], file=file)

sys.addaudithook(hook)
with open(os.environ["AUDIT_LOG"], "a") as file:
    print("hooked", os.getpid(), file=file)
"""


class Server:
    """A server on its own port.

    Attributes:
        port: the port.
        process: the server's process.
        lines: the lines on its standard error so far.
        start_s: seconds from its start until it listened.
    """

    def __init__(self, *options: str, request_s: float = 30.0, more: str = "", env: dict[str, str] | None = None):
        code = LAUNCH.format(request_s=request_s, more=more)
        words = [sys.executable, "-c", code, "--model", "demo", "--port", "0", *options]
        path = os.pathsep.join([*(env or {}).get("PYTHONPATH", "").split(os.pathsep), str(ROOT)]).strip(os.pathsep)
        start = time.monotonic()
        self.process = subprocess.Popen(
            words, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {}) | {"PYTHONPATH": path}
        )
        assert self.process.stderr is not None
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()
        assert self._ready.wait(HANG_S) and self.process.poll() is None, self.lines
        self.start_s = time.monotonic() - start
        self.port = int(self.lines[-1].rpartition(":")[2])
        self.url = f"http://127.0.0.1:{self.port}"

    def _read(self, stream: Any) -> None:
        for line in stream:
            self.lines.append(line)
            if "listening on" in line:
                self._ready.set()
        self._ready.set()

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, **({"timeout": HANG_S} | options))

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, **({"timeout": HANG_S} | options))

    def ask(self, text: str = "Say hello.", **more: Any) -> httpx.Response:
        """A short chat completion."""
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"model": "demo", "messages": messages, "max_tokens": 4} | more)

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics").text.splitlines()
        return {name.removeprefix("phi4_mlx_"): float(value) for name, _, value in (it.rpartition(" ") for it in lines)}

    def idle(self) -> bool:
        metrics = self.metrics()
        return metrics["answers_under_way"] == 0 and metrics["jobs"] == 0

    def raw(self) -> socket.socket:
        """A connection, for requests that no client would send."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=HANG_S)

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
            self.process.wait(HANG_S)
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


@contextlib.contextmanager
def audited(folder: Path, *options: str, **more: Any) -> Iterator[Server]:
    """A server whose processes may connect to nothing; checked at the end."""
    log = folder / "log"
    (folder / "sitecustomize.py").write_text(AUDIT)
    with serving(*options, env={"PYTHONPATH": str(folder), "AUDIT_LOG": str(log)}, **more) as server:
        yield server
        lines = log.read_text().splitlines()
    assert len([line for line in lines if line.startswith("hooked")]) >= 2  # the server and its engine
    assert [line for line in lines if not line.startswith("hooked")] == []


def until(condition: Callable[[], Any]) -> None:
    """Waits until the condition is true."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < HANG_S, "the condition did not become true"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def hear_hangups() -> None:
    """Lets a new process hear SIGHUP, which `nohup` has ignored in all that it starts."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def chat(**fields: Any) -> dict[str, Any]:
    """The body of a short chat completion."""
    return {"model": "demo", "messages": HELLO, "max_tokens": 2} | fields


def send(connection: socket.socket, path: str, body: str | bytes) -> None:
    """Sends a POST request, and reads nothing."""
    data = body.encode() if isinstance(body, str) else body
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    )
    connection.sendall(head.encode() + b"\r\n" + data)


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of a stream's events, without its end."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def answer_on(connection: socket.socket) -> bytes:
    """All bytes until the other end closes, or sends nothing for as long as the connection's timeout."""
    parts: Sequence[bytes] = []
    with contextlib.suppress(ConnectionError, TimeoutError):
        while part := connection.recv(65536):
            parts = [*parts, part]
    return b"".join(parts)

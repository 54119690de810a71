"""A process that makes grammars for another: an order on each line of its input, a result on each line of its output.

A hostile grammar takes any time and memory to compile, or crashes llguidance. Here it costs one request. The process
ends with its input, and so with the process that started it; its own timer ends it while it compiles.

    python -m phi4_mlx.grammar.worker
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.grammar.grammars import Grammar
from phi4_mlx.grammar.order import Order, Refused

MAX_ORDER_S = 2.0  # seconds for one grammar
MAX_GROWTH_BYTES = 2**29  # above the memory of an idle process; macOS does not enforce it, there only time is limited
_RENEW_BYTES = 2**27  # a process that has grown by so much makes room for a new one
_START_S = 60.0  # seconds until a process is ready, on a busy machine

_TOO_SLOW = f"takes more than {MAX_ORDER_S:g} s to compile; make it simpler, with shorter patterns and fewer of them"
_TOO_LARGE = (
    f"needs more than {MAX_GROWTH_BYTES >> 20} MB to compile, or ends its compiler; make it simpler, with shorter "
    "patterns and fewer of them"
)


def main() -> None:
    """Makes grammars until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads the answers
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    Order(("json_schema", {"pattern": "a"})).make()  # loads the library
    usual = _peak_bytes()
    _limit_memory()
    _write({"ready": True})
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, MAX_ORDER_S)
        result = _result(line)
        signal.setitimer(signal.ITIMER_REAL, 0)
        last = _peak_bytes() - usual > _RENEW_BYTES
        _write({**result, "last": last})
        if last:
            return


def _result(line: bytes) -> JsonObject:
    order = Order.read(line)
    try:
        grammar = order.make()
    except Refused as error:
        return {"error": str(error), "field": error.field}
    except MemoryError:
        os._exit(1)  # too little is left for an answer
    return {"text": grammar.text, "loosened": grammar.loosened}


def _write(value: JsonObject) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _limit_memory() -> None:
    """Limits the address space to what is in use now and `MAX_GROWTH_BYTES` more."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MAX_GROWTH_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class TooCostly(Refused):
    """A grammar exceeds the limit of time or memory, or crashes its compiler."""


class Worker:
    """A worker's process, started at its first order and again after its end. One thread may use it at a time.

    Attributes:
        pid: of the process; None if none runs.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process, if none runs, and waits until it is ready."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self.stop()
        # The package's own folder comes first, so that a file in the current one cannot stand in for a module.
        path = os.pathsep.join(dict.fromkeys(filter(None, sys.path)))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "phi4_mlx.grammar.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"},
        )
        with _killed_after(self._process, _START_S):
            _out(self._process).readline()

    def stop(self) -> int:
        """Ends the process; returns its exit code, as `subprocess` gives it."""
        if (process := self._process) is None:
            return -signal.SIGKILL
        self._process = None
        process.kill()  # without effect if it has ended by itself
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        return process.wait()

    def make(self, order: Order) -> Grammar:
        """Makes a grammar in the process; if the process is killed from outside, another one tries once more.

        Raises:
            Refused: it cannot be made.
            TooCostly: it exceeds a limit.
        """
        for attempt in range(2):
            self.start()
            if (result := self._ask(order)) is not None:
                if "error" in result:
                    raise Refused(result["error"], result["field"])
                return Grammar(result["text"], tuple(result["loosened"]))
            ended_by = self.stop()
            if attempt or ended_by not in (-signal.SIGKILL, -signal.SIGTERM):
                break
        field = "response_format" if order.format is not None else "tools"
        what = "the grammar" if order.format is not None else "the grammar of the tools"
        raise TooCostly(f"{what} {_TOO_SLOW if ended_by == -signal.SIGALRM else _TOO_LARGE}", field)

    def _ask(self, order: Order) -> JsonObject | None:
        """The process's result; None if it ended."""
        process = self._process
        assert process is not None and process.stdin is not None
        with _killed_after(process, MAX_ORDER_S + 1):  # its own timer does not count while it is stopped
            try:
                process.stdin.write(order.text().encode() + b"\n")
                process.stdin.flush()
                line = _out(process).readline()
            except (OSError, ValueError):  # it has ended, or another thread stops it
                return None
            if not line.endswith(b"\n"):
                process.wait()  # so that its own exit code counts
                return None
        result: JsonObject = json.loads(line)
        if result["last"]:
            self.stop()
        return result


def made_apart(order: Order) -> Grammar:
    """Makes a grammar in a process of its own.

    Raises:
        Refused: it cannot be made, or exceeds a limit.
    """
    worker = Worker()
    try:
        return worker.make(order)
    finally:
        worker.stop()


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
    """Kills a process if the block takes longer."""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _out(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


if __name__ == "__main__":
    main()

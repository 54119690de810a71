"""Grammars made in another process, for grammars whose cost is not known: what exceeds a limit ends that process.

An order is one line of JSON to `phi4_mlx.grammar.worker`, its result one line back. The other process ends with its
input, and so with this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject

MAX_ORDER_S = 2.0  # seconds of processor time for one grammar; twice as many on the clock
MAX_GROWTH_BYTES = 2**29  # above the memory of an idle process; macOS does not enforce it, there only time is limited
_START_S = 60.0  # seconds until a process is ready, on a busy machine

_TOO_SLOW = f"takes more than {MAX_ORDER_S:g} s to compile; make it simpler, with shorter patterns and fewer of them"
_TOO_LARGE = (
    f"needs more than {MAX_GROWTH_BYTES >> 20} MB to compile, or ends its compiler; make it simpler, with shorter "
    "patterns and fewer of them"
)


class Refused(RequestError):
    """A grammar cannot be made.

    Attributes:
        field: the field of the request that is at fault, "response_format" or "tools".
    """

    def __init__(self, message: str, field: str):
        super().__init__(message)
        self.field = field


class TooCostly(Refused):
    """A grammar exceeds the limit of time or memory, or crashes its compiler."""


class Worker:
    """A worker's process, started at its first order and again after its end. One thread may use it at a time.

    Attributes:
        pid: of the process; None if none runs.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._late = threading.Event()  # the last order took too long on the clock

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process, if none runs, and waits until it is ready.

        Raises:
            OSError: it cannot be started, or the worker is closed.
        """
        if self._closed:
            raise OSError("the worker is closed")
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

    def close(self) -> None:
        """Ends the process for good; an order in it fails."""
        self._closed = True
        self.stop()

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

    def make(self, order: str, field: str) -> tuple[str, tuple[str, ...]]:
        """Makes a grammar in the process; if the process is killed from outside, another one tries once more.

        Args:
            order: as `phi4_mlx.grammar.order.Order.text` writes it.
            field: the field to blame if it exceeds a limit.

        Returns:
            The grammar's text, and what it does not enforce.

        Raises:
            Refused: it cannot be made.
            TooCostly: it exceeds a limit.
        """
        for attempt in range(2):
            self.start()
            if (result := self._ask(order)) is not None:
                if "error" in result:
                    raise Refused(result["error"], result["field"])
                return result["text"], tuple(result["loosened"])
            ended_by = self.stop()
            slow = ended_by == -signal.SIGPROF or self._late.is_set()
            if attempt or slow or ended_by not in (-signal.SIGKILL, -signal.SIGTERM):
                break
        what = "the grammar" if field == "response_format" else "the grammar of the tools"
        raise TooCostly(f"{what} {_TOO_SLOW if slow else _TOO_LARGE}", field)

    def _ask(self, order: str) -> JsonObject | None:
        """The process's result; None if it ended."""
        process = self._process
        assert process is not None and process.stdin is not None
        with _killed_after(process, 2 * MAX_ORDER_S) as self._late:  # its own timer does not count while it waits
            try:
                process.stdin.write(order.encode() + b"\n")
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


def made_apart(order: str, field: str) -> tuple[str, tuple[str, ...]]:
    """Makes a grammar in a process of its own; as `Worker.make`.

    Raises:
        Refused: it cannot be made, or exceeds a limit.
    """
    worker = Worker()
    try:
        return worker.make(order, field)
    finally:
        worker.stop()


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kills a process if the block takes longer, and sets the event."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def _out(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout

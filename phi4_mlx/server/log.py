"""The server's log on standard error: lines with a time and a level, written without making a request wait."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Iterator

from phi4_mlx.terminal.printable import visible

LINES_LIMIT = 1_000  # that wait to be written; further ones are left out, and counted
FLUSH_S = 1.0  # for the last lines

LOG = logging.getLogger("phi4_mlx.server")


@contextlib.contextmanager
def logging_to(descriptor: int, level: str) -> Iterator[None]:
    """Writes the log to a file descriptor until the end of the block.

    Args:
        descriptor: a file, a pipe or a terminal.
        level: the lowest level of the server's own lines: "debug", "info", "warning" or "error". Of libraries there
            are only errors and, except uvicorn's, warnings.
    """
    root, uvicorn, lowest = logging.getLogger(), logging.getLogger("uvicorn"), level.upper()
    handler = LogHandler(descriptor)
    root.addHandler(handler)
    LOG.setLevel(lowest)
    uvicorn.setLevel(logging.DEBUG if level == "debug" else logging.ERROR)  # it warns of what clients do
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


class LogHandler(logging.Handler):
    """Writes lines in a thread, so that a parent process that does not read its pipe blocks no request.

    Args:
        descriptor: what it writes to.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(LINES_LIMIT)  # None ends the thread
        self._left_out = 0
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queues a record, or counts it if too many wait."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._left_out += 1
        except Exception:  # a library's record that cannot be formatted
            self.handleError(record)

    def close(self) -> None:
        """Waits a moment for the last lines."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(FLUSH_S)
        super().close()

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._left_out:
                line = f"{line}\n(then {self._left_out:,} lines were left out: nobody read the log)"
                self._left_out = 0
            data = f"{line}\n".encode(errors="backslashreplace")
            with contextlib.suppress(OSError):  # the reader is gone, or the disk is full
                while data:
                    data = data[os.write(self._descriptor, data) :]


class LogFormatter(logging.Formatter):
    """Formats a record so that no text in it steers a terminal, or looks like a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line; a traceback follows, indented."""
        return "\n    ".join(visible(line) for line in super().format(record).split("\n"))

"""The engine's end of its pipe: reports from two threads, and signs of life beside a long step."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Connection

from phi4_mlx.server.engine.protocol import Beat, Report

BEAT_S = 1.0


class Pulse:
    """Sends reports to the server, and a `Beat` every `BEAT_S` seconds from a thread of its own.

    Args:
        connection: to the server.

    Attributes:
        turns: steps taken so far; 0 while the model is loaded.
        waiting: True while there is nothing to do.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self.turns, self.waiting = 0, False
        for work in (self._beat, _end_with_the_server):
            threading.Thread(target=work, daemon=True).start()

    def send(self, report: Report) -> None:
        """Sends a report; waits for the thread that sends a beat.

        Raises:
            BrokenPipeError: the server has closed the connection.
        """
        with self._lock:
            self._connection.send(report)

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the server is gone
            while True:
                self.send(Beat(self.turns, self.waiting))
                time.sleep(BEAT_S)


def _end_with_the_server() -> None:
    """Ends this process once the server has died, even in the middle of a step or while the model is loaded."""
    server = multiprocessing.parent_process()
    if server is not None:
        server.join()
        os._exit(1)

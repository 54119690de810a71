"""Ctrl-C and SIGTERM: a run ends after the current step, all saved, and then the program ends as the signal demands."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """A request to stop a run, made by a signal.

    The first signal is a request. A second one ends the program at once, unless files are being written: then it is
    ignored.

    Attributes:
        number: the first signal; None if there was none.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self._writing = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Treats signals as requests. Does nothing outside the main thread, which alone may handle signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in before:
            signal.signal(number, self._caught)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Ignores a second signal, which would leave a file half-written."""
        self._writing += 1
        try:
            yield
        finally:
            self._writing -= 1

    def pass_on(self) -> None:
        """Ends the program as the signal would have done; does nothing if there was none."""
        if self.number is not None:
            _end(self.number)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = signal.Signals(number)
            with contextlib.suppress(OSError):  # not `print`, which the signal may have interrupted
                os.write(2, b"stopping after this step; a second signal ends the run at once, without this step\n")
        elif not self._writing:
            _end(signal.Signals(number))


def _end(number: signal.Signals) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)  # as shells count

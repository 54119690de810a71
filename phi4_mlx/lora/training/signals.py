"""Ctrl-C and SIGTERM: a run ends after the step under way, all saved, and then as a signal ends a program."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a run was asked to stop, by which signal, and when it may not be torn away.

    The first signal asks. A second one does at once what a signal does, but for one that comes while files are being
    written: that one is late, and is passed over.

    Attributes:
        number: of the first signal; None where there was none.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self._writing = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it signals are requests. Only the main thread has signals."""
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
        """Within it no signal tears anything."""
        self._writing += 1
        try:
            yield
        finally:
            self._writing -= 1

    def pass_on(self) -> None:
        """Ends the program as the signal would have done; nothing where there was none."""
        if self.number is not None:
            _end(self.number)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = signal.Signals(number)
            with contextlib.suppress(OSError):  # not `print`, which a signal may have broken into
                os.write(2, b"stopping after this step; a second signal leaves at once, without it\n")
        elif not self._writing:
            _end(signal.Signals(number))


def _end(number: signal.Signals) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)  # as shells count

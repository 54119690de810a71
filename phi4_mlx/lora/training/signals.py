"""Ctrl-C and SIGTERM: a run ends after the current step, all saved, and then the program ends as the signal demands.

Python handles a signal only when MLX returns from a computation, which may take minutes. So a thread answers: it reads
the signals from a pipe, into which Python writes them at once, whatever runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 1.0  # for the main thread to end the program in order; then it is ended at once


class Phase(NamedTuple):
    """A part of a run, and its answer to the first signal.

    Attributes:
        answer: what will happen; "{again}" stands for a second signal.
        waits: True if it is finished first; False if it ends at once, because nothing would be lost.
    """

    answer: str
    waits: bool


PREPARING = Phase("stopping: no step is under way, and nothing is lost", False)
_AT_ONCE = "{again} ends the run at once, unsaved steps lost"  # a line of 80 columns
STEP = Phase(f"stopping after this step; {_AT_ONCE}", True)
VALIDATION = Phase(f"stopping after this validation; {_AT_ONCE}", True)
TESTING = Phase("stopping: the adapter is saved, and its test set is not measured", False)


class Stop:
    """A request to stop a run, made by a signal.

    The first signal is a request, unless the phase is one that ends at once. A second one ends the program at once,
    unless files are being written: then it is ignored.

    Args:
        leave: called with an exit code to end the program at once, from another thread, if the main one is still in a
            computation `GRACE_S` after a signal that ends it. None for a caller's program, which is not ended so: it
            gets a KeyboardInterrupt or SystemExit as soon as Python is in control.

    Attributes:
        number: the first signal; None if there was none.
    """

    def __init__(self, leave: Callable[[int], object] | None = None) -> None:
        self.number: signal.Signals | None = None
        self._leave = leave
        self._phase, self._writing = PREPARING, 0
        self._signalled: dict[str, Phase] = {}  # "first": its phase; setdefault is atomic for handler and thread
        self._listens = self._again = False
        self._left = threading.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles signals. A nested call does nothing, nor does one outside the main thread, which alone may."""
        if self._listens or threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = {number: signal.getsignal(number) for number in SIGNALS}
        descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._answer, args=(reader,), daemon=True)
        thread.start()
        for number in before:
            signal.signal(number, self._caught)
        self._left.clear()
        self._listens = True
        try:
            yield
        finally:
            self._listens = False
            self._left.set()
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(descriptor)
            os.close(writer)
            thread.join()  # after the last answer
            os.close(reader)

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Sets the phase whose answer a signal gets in the block."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

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

    def _answer(self, reader: int) -> None:
        """Answers each signal that comes through the pipe; ends when the pipe is closed."""
        first = True
        while byte := os.read(reader, 1):
            if byte[0] not in SIGNALS:
                continue
            number, ends = signal.Signals(byte[0]), not first
            if first:
                phase = self._signalled.setdefault("first", self._phase)
                again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
                _say(phase.answer.format(again=again))
                ends = not phase.waits
            elif self._writing:
                _say("files are being written; the run ends when they are whole")
                ends = False
            else:
                self._again = True
            first = False
            if ends and self._leave is not None and not self._left.wait(GRACE_S):
                self._leave(128 + number)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number is not None or self._again, self.number or signal.Signals(number)
        phase = self._signalled.setdefault("first", self._phase)
        if (again or not phase.waits) and not self._writing:
            _end(signal.Signals(number))


def _say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal is gone, or standard error closed
        print(message, file=sys.stderr, flush=True)


def _end(number: signal.Signals) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)  # as shells count

"""The terminal of a chat: what is written to it, what is typed into it, and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import textwrap
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from phi4_mlx.terminal.markdown import RESET, MarkdownStream, terminal_width
from phi4_mlx.terminal.printable import one_line, printable

DIM, RED = "\x1b[2m", "\x1b[31m"


class Screen:
    """Standard output: a terminal with styles, a plain terminal, or a pipe that takes the text as it is.

    Attributes:
        colour: whether styles may be used; not where NO_COLOR is set.
    """

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self.colour = self._terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
        self._status = ""

    def write(self, text: str) -> None:
        """Writes text, at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def answer(self) -> tuple[Callable[[str], None], Callable[[], None]]:
        """Begins an answer: (writes a piece of it, ends it)."""
        if self.colour:
            stream = MarkdownStream(self.write)
            return lambda piece: stream.add(printable(piece)), stream.finish
        last = "\n"

        def add(piece: str) -> None:
            nonlocal last
            last = piece or last
            self.write(printable(piece) if self._terminal else piece)

        return add, lambda: self.write("" if last.endswith("\n") else "\n")

    def note(self, text: str) -> None:
        """A line that is ours, not the model's; only a terminal shows it."""
        if self._terminal:
            self._line(DIM, text)

    def error(self, text: str) -> None:
        """A line that says what went wrong, in a chat that goes on."""
        self._line(RED, one_line(text))
        self.end_paragraph()

    def ask(self, question: str) -> str:
        """What the person types in answer, Enter included; nothing that was typed before the question counts."""
        self.write(question)
        with keys(echo=True):
            if sys.stdin.isatty():
                termios.tcflush(sys.stdin, termios.TCIFLUSH)
            return sys.stdin.readline()

    def end_paragraph(self) -> None:
        """A blank line before the next prompt of a person."""
        if self._terminal:
            self.write("\n")

    def _line(self, style: str, text: str) -> None:
        text = textwrap.fill(text, terminal_width())
        self.write(f"{style}{text}{RESET}\n" if self.colour else f"{text}\n")

    def status(self, text: str) -> None:
        """A line that the next one replaces; an empty one clears it."""
        if self.colour and text != self._status:
            self.write(f"\r\x1b[K{DIM}{text}{RESET}" if text else "\r\x1b[K")
            self._status = text


@contextlib.contextmanager
def keys(echo: bool) -> Iterator[None]:
    """Shows what is typed, or keeps the terminal from echoing it into the middle of an answer."""
    if not sys.stdin.isatty():
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    flags = before[3] | termios.ECHO if echo else before[3] & ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSADRAIN, [*before[:3], flags, *before[4:]])
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


class StopButton:
    """Ctrl-C as a question that is asked between two tokens; pressed twice, it is what it always is.

    Attributes:
        pressed: whether it was.
        at_once: while a tool runs: then it is what it always is the first time.
    """

    def __init__(self) -> None:
        self.pressed = self.at_once = False
        self._before: Any = None

    def __enter__(self) -> StopButton:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *raised: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, signal_number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, self._before)
        if self.at_once:
            raise KeyboardInterrupt

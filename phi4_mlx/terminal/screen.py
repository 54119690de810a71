"""The screen and keyboard of a chat, and its handling of Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import textwrap
from collections.abc import Callable, Iterator
from types import FrameType

from phi4_mlx.terminal.markdown import MarkdownStream
from phi4_mlx.terminal.plain import PlainStream
from phi4_mlx.terminal.printable import one_line, printable
from phi4_mlx.terminal.style import RESET, terminal_width
from phi4_mlx.terminal.thoughts import ThoughtStream, write_aside

DIM, RED = "\x1b[2m", "\x1b[31m"

SignalHandler = Callable[[int, FrameType | None], object] | int | None  # as `signal.signal` returns it


class Answer:
    """An answer on the screen: Markdown where styles may be used, else plain text.

    Args:
        stream: writes the text.
        thoughts: writes the thoughts before it.
        clean: called with each piece before it is written.

    Attributes:
        unanswered: True if there are thoughts, but no answer after them so far.
    """

    unanswered = False

    def __init__(
        self, stream: MarkdownStream | PlainStream, thoughts: ThoughtStream, clean: Callable[[str], str]
    ) -> None:
        self._stream, self._thoughts, self._clean = stream, thoughts, clean

    def think(self, piece: str) -> None:
        """Writes the next piece of the thoughts."""
        self.unanswered = self.unanswered or bool(piece)
        self._thoughts.add(self._clean(piece))

    def add(self, piece: str) -> None:
        """Writes the next piece."""
        if piece:
            self._thoughts.end(answered=True)
            self.unanswered = False
        self._stream.add(self._clean(piece))

    def finish(self) -> None:
        """Writes what is still pending, and ends the line."""
        self._thoughts.end(answered=False)
        self._stream.finish()


class Screen:
    """Standard output: a terminal with styles, a plain terminal, or a pipe that receives the text unchanged.

    A pipe receives only answers; their thoughts go to standard error.

    Attributes:
        terminal: True if standard output is a terminal.
        colour: True if styles may be used; False where NO_COLOR is set.
    """

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.colour = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
        self._status = ""

    def write(self, text: str) -> None:
        """Writes text and flushes it."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def answer(self) -> Answer:
        """Begins an answer."""
        return self._begin(MarkdownStream(self.write) if self.colour else PlainStream(self.write))

    def plain_answer(self) -> Answer:
        """Begins an answer that is shown as plain text."""
        return self._begin(PlainStream(self.write))

    def _begin(self, stream: MarkdownStream | PlainStream) -> Answer:
        if self.terminal:
            return Answer(stream, ThoughtStream(self.write, self.colour), printable)
        aside = sys.stderr is not None and sys.stderr.isatty()
        thoughts = ThoughtStream(lambda text: write_aside(printable(text) if aside else text), False)
        return Answer(stream, thoughts, str)

    def note(self, text: str) -> None:
        """Writes a line of the program's own, such as a confirmation; only on a terminal."""
        if self.terminal:
            self._line(DIM, text)

    def error(self, text: str) -> None:
        """Writes one line about a mistake after which the chat continues."""
        self._line(RED, one_line(text))
        self.end_paragraph()

    def ask(self, question: str) -> str:
        """Asks the person; returns the line they type, Enter included. What was typed before is discarded."""
        self.write(question)
        with keys(echo=True):
            if sys.stdin.isatty():
                termios.tcflush(sys.stdin, termios.TCIFLUSH)
            return sys.stdin.readline()

    def end_paragraph(self) -> None:
        """Writes a blank line before the person's next prompt; only on a terminal."""
        if self.terminal:
            self.write("\n")

    def status(self, text: str) -> None:
        """Writes a line that the next status replaces; an empty one clears it. Only where styles may be used."""
        if self.colour and text != self._status:
            self.write(f"\r\x1b[K{DIM}{text}{RESET}" if text else "\r\x1b[K")
            self._status = text

    def _line(self, style: str, text: str) -> None:
        text = textwrap.fill(text, terminal_width())
        self.write(f"{style}{text}{RESET}\n" if self.colour else f"{text}\n")


@contextlib.contextmanager
def keys(echo: bool) -> Iterator[None]:
    """Turns the terminal's echo of typed keys on or off; off, they do not appear in the middle of an answer."""
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
    """The first Ctrl-C sets a flag that is polled between tokens; the second raises KeyboardInterrupt.

    Attributes:
        pressed: True after the first Ctrl-C.
        at_once: set it while a tool runs, so that the first Ctrl-C raises KeyboardInterrupt too.
    """

    def __init__(self) -> None:
        self.pressed = self.at_once = False
        self._before: SignalHandler = None

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

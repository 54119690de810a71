"""Text made safe for a terminal, and an answer written as plain text."""

from __future__ import annotations

from collections.abc import Callable


def one_line(text: str) -> str:
    """The text with line breaks as spaces, and without control characters."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """The text without control characters other than line breaks and tabs: a model must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


class PlainStream:
    """Writes an answer as it arrives, and ends its last line.

    Args:
        write: called with text to put on standard output.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._last = "\n"

    def add(self, text: str) -> None:
        """Writes the next piece of text."""
        self._write(text)
        self._last = text or self._last

    def finish(self) -> None:
        """Ends the line, unless a line break has."""
        if not self._last.endswith("\n"):
            self._write("\n")

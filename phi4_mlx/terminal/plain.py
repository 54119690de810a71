"""An answer written as plain text."""

from __future__ import annotations

from collections.abc import Callable


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

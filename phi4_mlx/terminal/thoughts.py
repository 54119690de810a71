"""The thoughts of a reasoning model, shown apart from its answer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from phi4_mlx.terminal.style import styled


class ThoughtStream:
    """Writes thoughts as they stream, between a heading of their own and one of the answer.

    Args:
        write: called with text.
        dim: True to write them in a dim style.
    """

    def __init__(self, write: Callable[[str], None], dim: bool) -> None:
        self._write, self._dim = write, dim
        self._last = ""

    def add(self, text: str) -> None:
        """Writes the next piece of the thoughts."""
        if text:
            self._show(text if self._last else f"--- thinking ---\n{text}")
            self._last = text

    def end(self, answered: bool) -> None:
        """Ends the last line of the thoughts; writes the heading of the answer if one follows."""
        if self._last:
            line = "" if self._last.endswith("\n") else "\n"
            self._write(line)
            if answered:
                self._show("--- answer ---")
                self._write("\n")
            self._last = ""

    def _show(self, text: str) -> None:
        self._write(styled(text, "dim") if self._dim else text)


def write_aside(text: str) -> None:
    """Writes text to standard error, which may be closed."""
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()

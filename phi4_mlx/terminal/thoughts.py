"""The thoughts of a reasoning model, shown apart from its answer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from phi4_mlx.terminal.amount import amount
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


def end_note(answer_tokens: int, *, cut: bool, unanswered: bool, full: bool) -> str:
    """The line about an answer that has only thoughts, or is cut.

    Args:
        answer_tokens: drawn tokens, thoughts included.
        cut: True if a limit has ended the answer, not the model.
        unanswered: True if it has only thoughts.
        full: True if the limit is that of the context or the memory, not --max-tokens.
    """
    if not cut:
        return "the model ended its thoughts without an answer"
    part = "the thoughts were cut, before an answer" if unanswered else "the answer was cut"
    limit = "the context and the memory have room for no more" if full else "raise --max-tokens"
    return f"{part}, after {amount(answer_tokens, 'token')}; {limit}"


def write_aside(text: str) -> None:
    """Writes text to standard error, which may be closed."""
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()

"""A line of text that is wrapped between words as it is written."""

from __future__ import annotations

from collections.abc import Callable

from phi4_mlx.terminal.style import RESET, char_width, sgr


class WrappedLine:
    """A line of text, wrapped between words.

    Attributes:
        columns: of the terminal.
        column: the cursor's.
        hanging: text that begins each further row.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self.columns = 80
        self.start()

    def start(self) -> None:
        """Begins a line."""
        self.column, self.hanging = 0, ""
        self._word: list[str] = []
        self._word_width = self._spaces = 0
        self._shown: frozenset[str] = frozenset()  # the styles in force

    def indent(self, indent: str) -> None:
        """Notes an indent that was written; further rows have it too if it leaves half of the row."""
        self.column, self.hanging = len(indent), indent if len(indent) <= self.columns // 2 else ""

    def put(self, char: str, styles: set[str], whole: bool = False) -> None:
        """Adds a character; `whole` for one that is not parted from the one before."""
        if char in " \t" and not whole:
            self._flush_word()
            self._spaces += 1
            return
        if self._shown != styles:
            self._word.append(RESET + sgr(*styles))
            self._shown = frozenset(styles)
        width = char_width(char)
        if not whole and (width == 2 or self._word_width + width > self.columns - len(self.hanging)):
            self._flush_word()  # wide scripts and words longer than a line break anywhere
        self._word.append(char)
        self._word_width += width

    def finish(self) -> None:
        """Writes the last word, and ends the styles."""
        self._flush_word()
        self._write(RESET if self._shown else "")

    def _flush_word(self) -> None:
        if self._word_width:
            if self.column and self.column + self._spaces + self._word_width > self.columns:
                self._write("\n" + self.hanging)
                self.column = 2 if self.hanging.startswith("\x1b") else len(self.hanging)
            else:
                self._write(" " * self._spaces)
                self.column += self._spaces
            self.column += self._word_width
            self._word_width = self._spaces = 0
        self._write("".join(self._word))
        self._word.clear()

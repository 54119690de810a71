"""A line of text that is wrapped between words as it is written."""

from __future__ import annotations

from collections.abc import Callable

from phi4_mlx.terminal.style import RESET, char_width, sgr, text_width


class WrappedLine:
    """A line of text, wrapped between words.

    Attributes:
        columns: of the terminal.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self.columns = 80
        self.start()

    def start(self) -> None:
        """Begins a line."""
        self._column = self._indent_width = 0  # of the cursor, of the indent
        self._indent = ""  # text that begins each further row
        self._word: list[str] = []
        self._word_width = self._spaces = 0
        self._shown: frozenset[str] = frozenset()  # the styles in force

    def indent(self, indent: str) -> None:
        """Records an indent already written; wrapped rows repeat it if it fits in half of a row."""
        self._column = text_width(indent)
        if self._column <= self.columns // 2:
            self._indent, self._indent_width = indent, self._column

    def put(self, char: str, styles: set[str], whole: bool = False) -> None:
        """Adds a character; `whole` forbids a line break before it."""
        if char in " \t" and not whole:
            self._flush_word()
            self._spaces += 1
            return
        if self._shown != styles:
            self._word.append(RESET + sgr(*styles))
            self._shown = frozenset(styles)
        width = char_width(char)
        if not whole and (width == 2 or self._word_width + width > self.columns - self._indent_width):
            self._flush_word()  # wide scripts and words longer than a line break anywhere
        self._word.append(char)
        self._word_width += width

    def finish(self) -> None:
        """Writes the last word, and ends the styles."""
        self._flush_word()
        self._write(RESET if self._shown else "")

    def _flush_word(self) -> None:
        if self._word_width:
            if self._column and self._column + self._spaces + self._word_width > self.columns:
                self._write("\n" + self._indent)
                self._column = self._indent_width
            else:
                self._write(" " * self._spaces)
                self._column += self._spaces
            self._column += self._word_width
            self._word_width = self._spaces = 0
        self._write("".join(self._word))
        self._word.clear()

"""Markdown on a terminal as it arrives, word by word; nothing written is ever changed.

The cursor only moves forward, so a resized window or an answer longer than the screen cannot garble it. An unfinished
word, emphasis or code until it closes or its line ends, and the rows of a table are buffered. Marks that do not close
within `LOOKAHEAD` characters are text, so that the work per character is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from phi4_mlx.terminal.highlight import Highlighter, highlighter
from phi4_mlx.terminal.inline import LOOKAHEAD, Piece, mark_ends, parse
from phi4_mlx.terminal.style import RESET, sgr, styled, terminal_width
from phi4_mlx.terminal.table import laid_out
from phi4_mlx.terminal.wrapped_line import WrappedLine

FENCE = "```"


class MarkdownStream:
    """Writes Markdown with terminal styles as it arrives in pieces.

    Args:
        write: called with text for the terminal.
        width: called at each word; returns the number of columns.
    """

    def __init__(self, write: Callable[[str], None], width: Callable[[], int] = terminal_width) -> None:
        self._write, self._width = write, width
        self._in_code = False  # inside a fence
        self._highlight: Highlighter | None = None
        self._table: list[str] = []
        self._formula = ""  # what closes the formula in which the cursor is
        self._line = WrappedLine(write)
        self._start_line()

    def add(self, text: str) -> None:
        """Adds the next piece of text."""
        self._line.columns = self._width()
        for char in text:
            if char == "\n":
                self._end_line()
            elif self._kind is None:
                self._pending += char
                self._begin(self._pending)
            elif self._kind in ("fence", "table"):
                self._row.append(char)
            elif self._kind == "highlighted":
                self._row.append(char)
                if len(self._row) > LOOKAHEAD:
                    self._become("code", "".join(self._row))
            elif self._kind == "code":
                self._write(char)
            else:
                self._inline(char)

    def finish(self) -> None:
        """Writes what is still buffered, and ends the line."""
        self._line.columns = self._width()
        if self._pending or self._kind is not None:
            self._end_line()
        self._end_table()

    # The first characters of a line decide its kind.

    def _start_line(self) -> None:
        self._kind: str | None = None
        self._pending = ""  # text whose meaning is not clear yet
        self._row: list[str] = []  # the characters of a table's row, of a fence or of highlighted code
        self._line.start()
        self._styles: set[str] = set()
        self._previous = "\n"
        self._pieces: list[Piece] = []  # from an asterisk that may still be closed
        self._waiting = 0  # characters in the pieces and in `_pending`
        self._ending = ""  # the last two characters of an open formula

    def _begin(self, line: str) -> None:
        """Decides the kind of the line as soon as its first characters allow it."""
        text = line.lstrip(" ")
        indent = line[: len(line) - len(text)]
        undecided = len(line) < LOOKAHEAD
        if self._in_code:
            if not (undecided and FENCE.startswith(text[:3])):
                if self._highlight is None:
                    self._become("code", RESET + sgr("code") + line)
                else:
                    self._become_pending("highlighted")
        elif text.startswith(FENCE):
            self._formula = ""
            self._become_pending("fence")
        elif self._formula:
            if not (undecided and FENCE.startswith(text)):
                self._become("text", indent)
                self._line.indent(indent)
                self._rest(text)
        elif text.startswith("|"):
            self._become_pending("table")
        elif undecided and (
            FENCE.startswith(text) or re.fullmatch(r"#{1,6}|-+|\*+|\+|>|\d{1,9}[.)]?", text)
        ):
            return  # the next character decides
        elif found := re.match(r"#{1,6} ", text):
            self._become("text")
            self._styles = {"heading"}
            self._rest(text[found.end() :])
        elif found := re.match(r"[-*+] |\d{1,9}[.)] ", text):
            mark = "• " if found[0][0] in "-*+" else found[0]
            self._become("text", indent + styled(mark, "mark"))
            self._line.indent(" " * len(indent + mark))
            self._rest(text[found.end() :])
        elif text.startswith(">"):
            mark = styled("│ ", "dim")
            self._become("text", mark)
            self._line.indent(mark)
            self._rest(text[1:].removeprefix(" "))
        else:
            self._become("text", indent)
            self._line.indent(indent)
            self._rest(text)

    def _become(self, kind: str, written: str = "") -> None:
        self._end_table()
        self._kind, self._pending = kind, ""
        self._write(written)

    def _become_pending(self, kind: str) -> None:
        if kind != "table":
            self._end_table()
        self._kind, self._row = kind, [self._pending]

    def _rest(self, text: str) -> None:
        for char in text:
            self._inline(char)

    def _end_line(self) -> None:
        if self._kind == "table":
            self._table.append("".join(self._row))
            self._start_line()
            return
        if self._kind == "fence":
            opening = "".join(self._row).strip()
            self._write(styled(opening, "dim"))
            self._in_code, self._highlight = True, highlighter(opening.lstrip("`"))
        elif self._kind == "highlighted":
            self._write_code("".join(self._row))
        elif self._kind == "code":
            self._write(RESET)
        elif self._kind == "text":
            self._settle("\n")
            self._line.finish()
        else:
            self._short_line()
        self._write("\n")
        self._start_line()

    def _short_line(self) -> None:
        """Writes a line that ended before its kind was clear: a closing fence, a rule, a blank or very short line."""
        self._end_table()
        text = self._pending.strip()
        self._formula = self._formula if text else ""  # an empty line ends it
        if self._in_code and text == FENCE:
            self._in_code = False
            self._write(styled(text, "dim"))
        elif self._in_code:
            self._write_code(self._pending)
        elif re.fullmatch(r"-{3,}|\*{3,}", text):
            self._write(styled("─" * min(40, self._line.columns), "dim"))
        else:
            self._write(text)

    def _write_code(self, line: str) -> None:
        """Writes a line of code that is whole."""
        self._write(styled(line, "code") if self._highlight is None else self._highlight(line))

    # A line of text: styles, and wrapping between words.

    def _inline(self, char: str) -> None:
        if self._formula:
            self._in_formula(char)
            return
        if mark_ends(self._pending, char):
            self._settle(char)
        if self._pending or self._pieces or char in "*`\\$":
            self._pending += char
            self._waiting += 1
            if self._waiting >= LOOKAHEAD:
                self._settle("\n")
        else:
            self._previous = char
            self._line.put(char, self._styles)

    def _in_formula(self, char: str) -> None:
        """Writes a character of a formula of several lines."""
        self._line.put(char, self._styles, whole=True)
        self._ending = (self._ending + char)[-2:]
        if self._ending.endswith(self._formula) and self._ending != "\\$":
            self._formula, self._previous = "", char

    def _settle(self, following: str) -> None:
        """Writes what is pending, unless a later mark of the line may still style it."""
        rest = parse(self._pending, self._pieces, self._previous, following)
        self._previous = (self._previous + self._pending)[-1 - len(rest)]
        self._pending = rest
        if following != "\n" and (rest or any(piece.opens for piece in self._pieces)):
            return
        for piece in self._pieces:
            for char in piece.text:
                self._line.put(char, self._styles | piece.styles, whole=piece.formula)
            self._formula = piece.closer
        self._pieces.clear()
        self._waiting = 0

    def _end_table(self) -> None:
        """Writes a table, which is laid out once its last row is known."""
        rows, self._table = self._table, []
        if rows:
            self._write("".join(f"{row}\n" for row in laid_out(rows, self._line.columns)))

"""Markdown on a terminal, as it comes: a word at a time, and what is written is never taken back.

The cursor only moves forward, so an answer longer than the screen, a resized window or a copied text cannot be garbled.
Held back are the word that is not finished, marks whose meaning the next character decides, and the rows of a table.
"""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Callable

RESET = "\x1b[0m"
STYLES = {"bold": "1", "italic": "3", "code": "36", "heading": "1;35", "mark": "35", "dim": "2"}
FENCE = "```"
TABLE_RULE = re.compile(r"[\s|:-]+")


def char_width(char: str) -> int:
    """Columns of a character: 0 for one that joins the one before, 2 for a wide one, else 1."""
    if char < "\u0300":
        return 1
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def text_width(text: str) -> int:
    """Columns of a text without line breaks."""
    return sum(map(char_width, text))


def terminal_width() -> int:
    """Columns to write in; the last one stays free, since terminals differ in what they do there."""
    return max(20, shutil.get_terminal_size().columns - 1)


class MarkdownStream:
    """Writes Markdown with terminal styles while it arrives in pieces.

    Args:
        write: called with text to put on the terminal.
        width: called at each word for the number of columns.
    """

    def __init__(self, write: Callable[[str], None], width: Callable[[], int] = terminal_width) -> None:
        self._write, self._width = write, width
        self._in_code = False  # inside a fence
        self._table: list[str] = []
        self._start_line()

    def add(self, text: str) -> None:
        """Takes the next piece of text."""
        for char in text:
            if char == "\n":
                self._end_line()
            elif self._kind is None:
                self._held += char
                self._begin(self._held)
            elif self._kind in ("fence", "table"):
                self._held += char
            elif self._kind == "code":
                self._write(char)
            else:
                self._inline(char)

    def finish(self) -> None:
        """Writes what is still held back, and ends the line."""
        if self._held or self._kind is not None:
            self._end_line()
        self._end_table()

    # A line: its first characters decide what it is.

    def _start_line(self) -> None:
        self._kind: str | None = None
        self._held = ""  # what cannot be judged yet
        self._column = 0
        self._word, self._word_width, self._spaces = "", 0, 0
        self._hanging = ""
        self._styles: set[str] = set()
        self._shown: frozenset[str] = frozenset()
        self._previous = " "
        self._run = ""  # marks whose meaning the next character decides
        self._code_ticks = 0

    def _begin(self, line: str) -> None:
        """Decides the kind of the line as soon as its first characters allow it."""
        text = line.lstrip(" ")
        indent = line[: len(line) - len(text)]
        if self._in_code:
            if not FENCE.startswith(text[:3]):
                self._become("code", RESET + _sgr("code") + line)
        elif text.startswith(FENCE):
            self._become_held("fence")
        elif text.startswith("|"):
            self._become_held("table")
        elif not text or FENCE.startswith(text) or re.fullmatch(r"#{1,6}|-+|\*+|\+|>|\d{1,9}[.)]?", text):
            return  # the next character decides
        elif found := re.match(r"#{1,6} ", text):
            self._become("text")
            self._styles = {"heading"}
            self._rest(text[found.end() :])
        elif found := re.match(r"[-*+] |\d{1,9}[.)] ", text):
            mark = "• " if found[0][0] in "-*+" else found[0]
            self._become("text", indent + _styled("mark", mark))
            self._column, self._hanging = len(indent + mark), " " * len(indent + mark)
            self._rest(text[found.end() :])
        elif text.startswith(">"):
            self._become("text", _styled("dim", "│ "))
            self._column, self._hanging = 2, _styled("dim", "│ ")
            self._rest(text[1:].removeprefix(" "))
        else:
            self._become("text", indent)
            self._column, self._hanging = len(indent), indent
            self._rest(text)

    def _become(self, kind: str, written: str = "") -> None:
        self._end_table()
        self._kind, self._held = kind, ""
        self._write(written)

    def _become_held(self, kind: str) -> None:
        if kind != "table":
            self._end_table()
        self._kind = kind

    def _rest(self, text: str) -> None:
        for char in text:
            self._inline(char)

    def _end_line(self) -> None:
        if self._kind == "table":
            self._table.append(self._held)
            self._start_line()
            return
        if self._kind == "fence":
            self._write(_styled("dim", self._held.strip()))
            self._in_code = True
        elif self._kind == "code":
            self._write(RESET)
        elif self._kind == "text":
            self._inline("\n")
        else:
            self._short_line()
        self._write("\n")
        self._start_line()

    def _short_line(self) -> None:
        """A line that ended before its kind was clear: a closing fence, a rule, a blank line, a few characters."""
        self._end_table()
        text = self._held.strip()
        if self._in_code and text == FENCE:
            self._in_code = False
            self._write(_styled("dim", text))
        elif self._in_code:
            self._write(_styled("code", self._held))
        elif re.fullmatch(r"-{3,}|\*{3,}", text):
            self._write(_styled("dim", "─" * min(40, self._width())))
        else:
            self._write(text)

    # Within a line of text: styles, and words that are not broken.

    def _inline(self, char: str) -> None:
        if self._run and (char != self._run[0] or self._run == "\\"):
            run, self._run = self._run, ""
            if run == "\\":
                if char in "*_`#":
                    self._put(char)
                    return
                self._put("\\")
            elif run[0] == "`":
                self._tick(len(run))
            else:
                self._star(len(run), char)
        if char == "`" or (char in "*\\" and not self._code_ticks):
            self._run += char
        elif char == "\n":
            self._flush_word()
            self._write(RESET if self._shown else "")
        else:
            self._put(char)

    def _tick(self, count: int) -> None:
        if not self._code_ticks:
            self._code_ticks = count
            self._styles.add("code")
        elif count == self._code_ticks:
            self._code_ticks = 0
            self._styles.discard("code")
        else:
            self._put_all("`" * count)

    def _star(self, count: int, following: str) -> None:
        """Asterisks: emphasis where they touch the words that they emphasise, else themselves."""
        names = {1: ("italic",), 2: ("bold",), 3: ("bold", "italic")}.get(count, ())
        opens = not following.isspace() and (count > 1 or not self._previous.isalnum())
        closes = not self._previous.isspace()
        if names and closes and self._styles.issuperset(names):
            self._styles.difference_update(names)
        elif names and opens and self._styles.isdisjoint(names):
            self._styles.update(names)
        else:
            self._put_all("*" * count)

    def _put_all(self, text: str) -> None:
        for char in text:
            self._put(char)

    def _put(self, char: str) -> None:
        self._previous = char
        if char in " \t":
            self._flush_word()
            self._spaces += 1
            return
        if self._shown != self._styles:
            self._word += RESET + "".join(map(_sgr, sorted(self._styles)))
            self._shown = frozenset(self._styles)
        width = char_width(char)
        if width == 2 or self._word_width + width > self._width() - len(self._hanging):
            self._flush_word()  # wide scripts break anywhere, and so must a word longer than a line
        self._word += char
        self._word_width += width

    def _flush_word(self) -> None:
        if not self._word_width:
            self._write(self._word)
            self._word = ""
            return
        if self._column and self._column + self._spaces + self._word_width > self._width():
            self._write("\n" + self._hanging)
            self._column = 2 if self._hanging.startswith("\x1b") else len(self._hanging)
        else:
            self._write(" " * self._spaces)
            self._column += self._spaces
        self._write(self._word)
        self._column += self._word_width
        self._word, self._word_width, self._spaces = "", 0, 0

    # A table is laid out when its last row is known.

    def _end_table(self) -> None:
        rows, self._table = self._table, []
        if not rows:
            return
        cells = [[_bare(cell) for cell in row.strip().strip("|").split("|")] for row in rows]
        ruled = len(rows) > 1 and TABLE_RULE.fullmatch(rows[1]) is not None
        body = [row for at, row in enumerate(cells) if not (ruled and at == 1)]
        columns = max(map(len, body))
        body = [row + [""] * (columns - len(row)) for row in body]
        widths = [max(text_width(row[at]) for row in body) for at in range(columns)]
        if sum(widths) + 3 * (columns - 1) > self._width():
            self._write("".join(row.strip() + "\n" for row in rows))
            return
        for at, row in enumerate(body):
            padded = [cell + " " * (width - text_width(cell)) for cell, width in zip(row, widths, strict=True)]
            line = " │ ".join(padded).rstrip()
            self._write((_styled("bold", line) if ruled and at == 0 else line) + "\n")
            if ruled and at == 0:
                self._write(_styled("dim", "─┼─".join("─" * width for width in widths)) + "\n")


def _bare(cell: str) -> str:
    return cell.strip().replace("**", "").replace("`", "")


def _sgr(style: str) -> str:
    return f"\x1b[{STYLES[style]}m"


def _styled(style: str, text: str) -> str:
    return f"{_sgr(style)}{text}{RESET}"

"""Markdown on a terminal as it arrives, word by word; nothing written is ever changed.

The cursor only moves forward, so a resized window or an answer longer than the screen cannot garble it. An unfinished
word, emphasis or code until it closes or its line ends, and the rows of a table are buffered. Marks that do not close
within `LOOKAHEAD` characters are text, so that the work per character is bounded.
"""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

RESET = "\x1b[0m"
STYLES = {"bold": "1", "italic": "3", "code": "36", "heading": "1;35", "mark": "35", "dim": "2"}
SGR = re.compile(r"\x1b\[[\d;]*m")
FENCE = "```"
LOOKAHEAD = 1000  # characters that may wait for the mark that decides on them; also of a table's row
TABLE_RULE = re.compile(r"[\s|:-]+")
CODE = r"(?P<ticks>`+)(?!`)(?P<code>.+?)(?<!`)(?P=ticks)(?!`)"
CELL_END = re.compile(rf"\\[|`]|{CODE}|`+|\|")  # a cell ends where this matches a single pipe
INLINE = re.compile(rf"\\(?P<escaped>[*_`#])|{CODE}|(?P<stars>\*+)|`+|\\\\|\\|[^\\*`]+")


def char_width(char: str) -> int:
    """Columns of a character: 0 if it combines with the one before, 2 if it is wide, else 1."""
    if char < "\u0300":
        return 1
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def text_width(text: str) -> int:
    """Columns of a text without line breaks; styles take none."""
    return sum(map(char_width, SGR.sub("", text)))


def terminal_width() -> int:
    """Columns to write in. The last one stays free: terminals differ in how they wrap there."""
    return max(20, shutil.get_terminal_size().columns - 1)


class MarkdownStream:
    """Writes Markdown with terminal styles as it arrives in pieces.

    Args:
        write: called with text for the terminal.
        width: called at each word; returns the number of columns.
    """

    def __init__(self, write: Callable[[str], None], width: Callable[[], int] = terminal_width) -> None:
        self._write, self._width = write, width
        self._in_code = False  # inside a fence
        self._table: list[str] = []
        self._line = _WrappedLine(write)
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
        self._row: list[str] = []  # the characters of a table's row or of a fence
        self._line.start()
        self._styles: set[str] = set()
        self._previous = " "
        self._pieces: list[_Piece] = []  # from an asterisk that may still be closed
        self._waiting = 0  # characters in the pieces and in `_pending`

    def _begin(self, line: str) -> None:
        """Decides the kind of the line as soon as its first characters allow it."""
        text = line.lstrip(" ")
        indent = line[: len(line) - len(text)]
        undecided = len(line) < LOOKAHEAD
        if self._in_code:
            if not (undecided and FENCE.startswith(text[:3])):
                self._become("code", RESET + _sgr("code") + line)
        elif text.startswith(FENCE):
            self._become_pending("fence")
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
            self._become("text", indent + _styled(mark, "mark"))
            self._line.indent(" " * len(indent + mark))
            self._rest(text[found.end() :])
        elif text.startswith(">"):
            self._become("text", _styled("│ ", "dim"))
            self._line.column, self._line.hanging = 2, _styled("│ ", "dim")
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
            self._write(_styled("".join(self._row).strip(), "dim"))
            self._in_code = True
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
        if self._in_code and text == FENCE:
            self._in_code = False
            self._write(_styled(text, "dim"))
        elif self._in_code:
            self._write(_styled(self._pending, "code"))
        elif re.fullmatch(r"-{3,}|\*{3,}", text):
            self._write(_styled("─" * min(40, self._line.columns), "dim"))
        else:
            self._write(text)

    # A line of text: styles, and wrapping between words.

    def _inline(self, char: str) -> None:
        if self._mark_ends_before(char):
            self._settle(char)
        if self._pending or self._pieces or char in "*`\\":
            self._pending += char
            self._waiting += 1
            if self._waiting >= LOOKAHEAD:
                self._settle("\n")
        else:
            self._previous = char
            self._line.put(char, self._styles)

    def _mark_ends_before(self, char: str) -> bool:
        """True if what is pending ends with a whole mark that may close something."""
        pending = self._pending
        last = pending[-1:]
        if not pending.startswith("`"):
            return pending[-2:-1] == "\\" or (last in ("*", "`") and char != last)
        ticks = len(pending) - len(pending.lstrip("`"))  # in code, only as many backticks matter
        return last == "`" and char != "`" and len(pending) - len(pending.rstrip("`")) == ticks

    def _settle(self, following: str) -> None:
        """Writes what is pending, unless a later mark of the line may still style it."""
        rest = _parse(self._pending, self._pieces, self._previous, following)
        self._previous = (self._previous + self._pending)[-1 - len(rest)]
        self._pending = rest
        if following != "\n" and (rest or any(piece.opens for piece in self._pieces)):
            return
        for piece in self._pieces:
            for char in piece.text:
                self._line.put(char, self._styles | piece.styles)
        self._pieces.clear()
        self._waiting = 0

    def _end_table(self) -> None:
        """Writes a table, which is laid out once its last row is known."""
        rows, self._table = self._table, []
        if rows:
            self._write("".join(f"{row}\n" for row in _laid_out(rows, self._line.columns)))


class _WrappedLine:
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

    def put(self, char: str, styles: set[str]) -> None:
        """Adds a character."""
        if char in " \t":
            self._flush_word()
            self._spaces += 1
            return
        if self._shown != styles:
            self._word.append(RESET + _sgr(*styles))
            self._shown = frozenset(styles)
        width = char_width(char)
        if width == 2 or self._word_width + width > self.columns - len(self.hanging):
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


def _laid_out(rows: list[str], width: int) -> list[str]:
    """The rows of a table, its columns aligned if they fit."""
    ruled = len(rows) > 1 and TABLE_RULE.fullmatch(rows[1]) is not None
    body = _body(rows, ruled, width)
    widths = [max(map(text_width, column)) for column in zip(*body, strict=True)]
    if not body or sum(widths) + 3 * (len(widths) - 1) > width:
        return [row.strip() for row in rows]
    lines = [
        " │ ".join(cell + " " * (wide - text_width(cell)) for cell, wide in zip(row, widths, strict=True)).rstrip()
        for row in body
    ]
    return [lines[0], _styled("─┼─".join("─" * wide for wide in widths), "dim"), *lines[1:]] if ruled else lines


def _body(rows: list[str], ruled: bool, width: int) -> list[list[str]]:
    """The styled cells of a table, as many in each row; none if they cannot fit."""
    if max(map(len, rows)) > LOOKAHEAD:
        return []
    cells = [_cells(row, {"bold"} if ruled and at == 0 else set()) for at, row in enumerate(rows)]
    body = [row for at, row in enumerate(cells) if not (ruled and at == 1)]
    columns = max(map(len, body))
    return [] if 3 * (columns - 1) > width else [row + [""] * (columns - len(row)) for row in body]


@dataclass
class _Piece:
    """Text of one style, or asterisks that later ones may close."""

    text: str
    styles: set[str]
    opens: bool = False


def _parse(text: str, pieces: list[_Piece], previous: str = " ", following: str = "\n") -> str:
    """Adds the next part of a line to its pieces; returns the rest, from a backtick that is not closed yet.

    Unpaired marks stay in the text. At the end of the line the rest is empty.
    """
    around = previous + text + following
    for found in INLINE.finditer(text):
        if count := len(found["stars"] or ""):
            left, right = around[found.start()], around[found.end() + 1]
            if _flanks(left, right, count):
                count = _close(pieces, count)
            pieces.append(_Piece("*" * count, set(), count > 0 and _flanks(right, left, count)))
        elif found["code"]:
            pieces.append(_Piece(found["code"], {"code"}))
        elif found[0][0] == "`" and following != "\n":
            return text[found.start() :]
        else:
            pieces.append(_Piece(found["escaped"] or found[0], set()))
    return ""


def _close(pieces: list[_Piece], count: int) -> int:
    """Styles the text back to the marks that `count` asterisks close; returns how many of them close nothing."""
    for at in range(len(pieces) - 1, -1, -1):
        if not count:
            break
        opening = pieces[at]
        size = len(opening.text)
        if opening.opens and {size, count} != {1, 2}:  # one never closes two, or two one
            used = min(size, count)
            count -= used
            for piece in pieces[at + 1 :]:
                piece.styles.update(["italic"] * (used % 2), ["bold"] * (used > 1))
                piece.opens = False
            opening.text = opening.text[used:]
            opening.opens = size > used
    return count


def _flanks(inner: str, outer: str, count: int) -> bool:
    """True if asterisks between `outer` and `inner` may emphasise `inner`: CommonMark's rule, less products and powers.

    Within a word, one asterisk (a*b) and two next to a digit (2**3) are text; two between letters may emphasise.
    """
    if inner.isspace():
        return False
    if not outer.isalnum() or char_width(outer) == 2:  # wide scripts put no spaces between words
        return True
    return count > 1 and unicodedata.category(inner)[0] not in "PS" and not (inner.isdigit() or outer.isdigit())


def _cells(row: str, styles: set[str]) -> list[str]:
    """The styled cells of a table's row; a pipe that is escaped or in code is text."""
    parted = CELL_END.sub(lambda found: "\n" if found[0] == "|" else found[0].replace("\\|", "|"), row.strip())
    shown = []
    for cell in parted.removeprefix("\n").removesuffix("\n").split("\n"):
        pieces: list[_Piece] = []
        _parse(cell.strip(), pieces)
        shown.append("".join(_styled(piece.text, *piece.styles | styles) for piece in pieces))
    return shown


def _sgr(*styles: str) -> str:
    return "".join(f"\x1b[{STYLES[style]}m" for style in sorted(styles))


def _styled(text: str, *styles: str) -> str:
    return _sgr(*styles) + text + RESET if styles and text else text

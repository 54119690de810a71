"""Emphasis, code and escapes within a line of Markdown."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from phi4_mlx.terminal.style import char_width

LOOKAHEAD = 1000  # characters that may wait for the mark that decides on them; also of a table's row
CODE = r"(?P<ticks>`+)(?!`)(?P<code>.+?)(?<!`)(?P=ticks)(?!`)"
INLINE = re.compile(rf"\\(?P<escaped>[*_`#])|{CODE}|(?P<stars>\*+)|`+|\\\\|\\|[^\\*`]+")


@dataclass
class Piece:
    """Text of one style, or asterisks that later ones may close."""

    text: str
    styles: set[str]
    opens: bool = False


def parse(text: str, pieces: list[Piece], previous: str = " ", following: str = "\n") -> str:
    """Adds the next part of a line to its pieces; returns the rest, from a backtick that is not closed yet.

    Unpaired marks stay in the text. At the end of the line the rest is empty.
    """
    around = previous + text + following
    for found in INLINE.finditer(text):
        if count := len(found["stars"] or ""):
            left, right = around[found.start()], around[found.end() + 1]
            if _flanks(left, right, count):
                count = _close(pieces, count)
            pieces.append(Piece("*" * count, set(), count > 0 and _flanks(right, left, count)))
        elif found["code"]:
            pieces.append(Piece(found["code"], {"code"}))
        elif found[0][0] == "`" and following != "\n":
            return text[found.start() :]
        else:
            pieces.append(Piece(found["escaped"] or found[0], set()))
    return ""


def _close(pieces: list[Piece], count: int) -> int:
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

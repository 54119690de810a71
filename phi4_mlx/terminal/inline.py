"""Emphasis, code, escapes and LaTeX formulas within a line of Markdown.

A formula is text that no mark within it changes. As in Pandoc, no space follows the dollar that opens one or precedes
the dollar that closes it, and no digit follows that: prices are text. So is a dollar before plain words.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from phi4_mlx.terminal.style import char_width

LOOKAHEAD = 1000  # characters that may wait for the mark that decides on them; also of a table's row
CODE = r"(?P<ticks>`+)(?!`)(?P<code>.+?)(?<!`)(?P=ticks)(?!`)"
WORD = r"\s[A-Za-z]{2,}"
DOLLAR = rf"\$(?![\s$])(?:\\.|(?!{WORD}[\s.,;:!?])\s|[^\s$\\{{])*(?:\{{(?:\\.|[^$\\])*)?"  # to the closing one
FORMULA = rf"(?P<formula>\$\$(?!\$).+?\$\$|\\\(.+?\\\)|\\\[.+?\\\]|{DOLLAR}(?<=\S)\$(?!\d))"
OPENER = r"\$\$?(?!\$)|\\[(\[]"
INLINE = re.compile(
    rf"\\(?P<escaped>[*_`#$])|\$\$\$+|{FORMULA}|{CODE}|(?P<stars>\*+)|`+|(?P<opener>{OPENER})|\\\\|\\|[^\\*`$]+"
)
CLOSERS = {"$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}


@dataclass
class Piece:
    """Text of one style, or asterisks that later ones may close.

    Attributes:
        text: what is shown.
        styles: names of `STYLES`.
        opens: True for asterisks that may be closed.
        formula: True for text that is not wrapped.
        closer: what ends the formula in a later line.
    """

    text: str
    styles: set[str]
    opens: bool = False
    formula: bool = False
    closer: str = ""


def parse(text: str, pieces: list[Piece], previous: str = " ", following: str = "\n") -> str:
    """Adds the next part of a line to its pieces; returns the rest, from code or a formula that is not closed yet.

    Unpaired marks stay in the text. At the end of the line the rest is empty.
    """
    around = previous + text + following
    for found in INLINE.finditer(text):
        if count := len(found["stars"] or ""):
            left, right = around[found.start()], around[found.end() + 1]
            if _flanks(left, right, count):
                count = _close(pieces, count)
            pieces.append(Piece("*" * count, set(), count > 0 and _flanks(right, left, count)))
        elif found["formula"]:
            pieces.append(Piece(found[0], set(), formula=True))
        elif opener := found["opener"]:
            rest = text[found.start() :]
            if following != "\n" and (opener != "$" or _may_close(rest + following)):
                return rest
            starts = previous == "\n" and not found.start() and not pieces
            if following == "\n" and _goes_on(rest, opener, starts):
                pieces.append(Piece(rest, set(), formula=True, closer=CLOSERS[opener]))
                return ""
            pieces.append(Piece(opener, set()))
        elif found["code"]:
            pieces.append(Piece(found["code"], {"code"}))
        elif found[0][0] == "`" and following != "\n":
            return text[found.start() :]
        else:
            pieces.append(Piece(found["escaped"] or found[0], set()))
    return ""


def mark_ends(pending: str, char: str) -> bool:
    """True if pending text ends with a complete mark that may close something; `char` is the next character."""
    last = pending[-1:]
    if re.match(OPENER, pending):
        return _formula_decided(pending, char)
    if not pending.startswith("`"):
        return pending[-2:-1] == "\\" or (last != "" and last in "*`$" and char != last)
    ticks = len(pending) - len(pending.lstrip("`"))  # in code, only as many backticks matter
    return last == "`" and char != "`" and len(pending) - len(pending.rstrip("`")) == ticks


def _formula_decided(pending: str, char: str) -> bool:
    """True if text that begins like a formula is closed or cannot be one; `char` is the next character."""
    if pending == "$":
        return char.isspace()
    if pending[0] == "$" != pending[1]:
        prose = not char.isalpha() and re.search(rf"{WORD}$", pending[-40:]) and "{" not in pending
        return pending[-1] == "$" or bool(prose)
    return len(pending) > 4 and pending.endswith(CLOSERS[pending[:2]])


def _may_close(rest: str) -> bool:
    """True if a dollar and the text after it may be the beginning of a formula."""
    return re.fullmatch(rf"{DOLLAR}\\?", rest) is not None


def _goes_on(rest: str, opener: str, starts: bool) -> bool:
    """True if a formula that is not closed in its line goes on in the next one; `starts` if it begins the line."""
    if opener[0] == "\\" or rest.rstrip() == "$$" or (opener == "$$" and starts):
        return True
    return re.search(r"\\[A-Za-z]|[\^{]", rest) is not None and (opener == "$$" or _may_close(rest))


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

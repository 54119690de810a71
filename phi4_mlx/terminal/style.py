"""Styles of text on a terminal, and the columns that it takes.

The colours are among those that dark and light backgrounds both leave readable: no black, white, blue or yellow.
"""

from __future__ import annotations

import re
import shutil
import unicodedata

RESET = "\x1b[0m"
STYLES = {
    "bold": "1", "italic": "3", "code": "36", "heading": "1;35", "mark": "35", "dim": "2",
    "keyword": "35", "string": "32", "number": "36", "comment": "2", "name": "1", "removed": "31", "added": "32",
}  # fmt: skip
SGR = re.compile(r"\x1b\[[\d;]*m")


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


def sgr(*styles: str) -> str:
    """The escape sequence that turns styles of `STYLES` on."""
    return "".join(f"\x1b[{STYLES[style]}m" for style in sorted(styles))


def styled(text: str, *styles: str) -> str:
    """A text in styles of `STYLES`, which end with it."""
    return sgr(*styles) + text + RESET if styles and text else text

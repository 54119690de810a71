"""Text made safe for a terminal."""

from __future__ import annotations


def one_line(text: str) -> str:
    """The text with line breaks as spaces, and without control characters."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """The text without control characters other than line breaks and tabs: a model must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


def visible(text: str) -> str:
    """The text on one line, with an escape for each character that a terminal would not show: nothing is hidden."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)

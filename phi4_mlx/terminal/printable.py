"""Text made safe for a terminal."""

from __future__ import annotations


def one_line(text: str) -> str:
    """The text with line breaks as spaces, and without control characters."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """The text without control characters other than line breaks and tabs: a model must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))

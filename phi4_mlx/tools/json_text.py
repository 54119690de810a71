"""JSON that comes in pieces: where it ends, or where it ceases to be JSON, each character looked at once.

Python's own reader needs the whole text, and starts anew when there is more of it.

Source: RFC 8259.
"""

from __future__ import annotations

import json
import re
from typing import Any

DEEPEST = 200  # brackets within brackets; Python's reader gives up at a depth that differs from build to build
LONGEST_NUMBER = 4300  # digits that Python makes a number of

_ESCAPE = 5  # the character behind a backslash, and the four digits that may follow it
_STRING_PART = re.compile(r'[^"\\]*')
_NUMBER_PART = re.compile(r"[-+.0-9eE]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")


class JsonScanner:
    """Reads a JSON value, a list, an object or a string, up to its end or to the first character that cannot be JSON.

    Control characters in strings are let through: a model writes line breaks there.

    Args:
        stop: what begins with a bracket and is no JSON, such as `[WORD]`; it ends the reading, and is not read.

    Attributes:
        done: the value is whole.
        problem: why it can never be, or nothing.
        too_large: it may be JSON, but is larger than is read here.
        has_object: the start of an object was read, in this value or one before.
    """

    def __init__(self, stop: str = "") -> None:
        self.done = self.has_object = self.too_large = False
        self.problem = ""
        self._stop = stop
        self._closers: list[str] = []  # brackets that are due
        self._expected = "value"  # or "item" (a value or the end), "key", "first key" (or the end), "colon", "next"
        self._in_string = False
        self._escape = 0  # characters of an escape that are due; the first says how many more
        self._number: list[str] = []

    def restart(self) -> None:
        """Turns to the next value, after one that is done."""
        self.done, self._expected = False, "value"

    def read(self, text: str, at: int) -> int:
        """Reads on from `at`, and returns how far it came; short of the end, though not done, if it needs more."""
        while at < len(text) and not self.done and not self.problem:
            if self._in_string:
                end = self._read_string(text, at)
            elif self._number:
                end = self._read_number(text, at)
            else:
                end = self._read_token(text, at)
            if end < 0:
                break
            at = end
        return at

    def _read_string(self, text: str, at: int) -> int:
        if self._escape:
            allowed = '"\\/bfnrtu' if self._escape == _ESCAPE else "0123456789abcdefABCDEF"
            if text[at] not in allowed:
                self.problem = "a string in it has a broken escape"
                return at
            if self._escape == _ESCAPE:
                self._escape = 4 if text[at] == "u" else 0
            else:
                self._escape -= 1
            return at + 1
        found = _STRING_PART.match(text, at)
        end = found.end() if found else at
        if end < len(text):
            if text[end] == "\\":
                self._escape = _ESCAPE
            else:
                self._in_string = False
                self._end_value("colon" if self._expected in ("key", "first key") else "next")
            end += 1
        return end

    def _read_number(self, text: str, at: int) -> int:
        found = _NUMBER_PART.match(text, at)
        end = found.end() if found else at
        self._number.append(text[at:end])
        if end < len(text):
            number = "".join(self._number)
            self._number.clear()
            if len(number) <= LONGEST_NUMBER and _NUMBER.fullmatch(number):
                self._end_value()
            else:
                self.too_large = len(number) > LONGEST_NUMBER
                self.problem = f"{number[:20]!r} begins no number of at most {LONGEST_NUMBER} characters"
        return end

    def _read_token(self, text: str, at: int) -> int:
        """Reads white space, a bracket, a sign, or what begins a value; -1 if it needs more."""
        char, expected = text[at], self._expected
        if char in " \t\n\r":
            return at + 1
        if char == '"' and expected in ("value", "item", "key", "first key"):
            self._in_string = True
        elif char in "]}" and self._closers[-1:] == [char] and expected in ("item", "first key", "next"):
            self._closers.pop()
            self._end_value()
        elif char == "," and expected == "next":
            self._expected = "key" if self._closers[-1] == "}" else "value"
        elif char == ":" and expected == "colon":
            self._expected = "value"
        elif expected in ("value", "item"):
            return self._read_value(text, at)
        else:
            self.problem = f"{char!r} is not JSON where it stands"
            return at
        return at + 1

    def _read_value(self, text: str, at: int) -> int:
        """Reads the start of a list, an object or a number, or a whole name."""
        char = text[at]
        if char in "[{":
            if char == "[" and self._stop.startswith(text[at : at + len(self._stop)]) and self._stop:
                if len(text) - at < len(self._stop):
                    return -1
                self.problem = f"{self._stop!r} is not JSON"
            elif len(self._closers) == DEEPEST:
                self.too_large = True
                self.problem = f"it is nested deeper than {DEEPEST} brackets"
            else:
                self._closers.append("]" if char == "[" else "}")
                self._expected = "item" if char == "[" else "first key"
                self.has_object = self.has_object or char == "{"
                return at + 1
            return at
        if char in "-0123456789":
            self._number.append("")
            return at
        for name in ("true", "false", "null"):
            if text.startswith(name, at):
                self._end_value()
                return at + len(name)
            if name.startswith(text[at : at + len(name)]):
                return -1
        self.problem = f"{char!r} is not JSON where it stands"
        return at

    def _end_value(self, expected: str = "next") -> None:
        self._expected = expected
        self.done = not self._closers


def json_text(value: Any) -> str:
    """JSON on one line, as the model reads and writes it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)

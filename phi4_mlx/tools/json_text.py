"""JSON on one line, and an incremental scanner that finds the end of a JSON value in text that arrives in pieces.

Python's own reader needs the whole text, and would read it again from the start for each new piece.

Source: RFC 8259.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 200  # nested brackets; Python's reader gives up at a depth that depends on its build
MAX_NUMBER = 4300  # characters; Python converts no more digits than this

_ESCAPE = 5  # characters: the one after the backslash, and up to four hex digits
_STRING_PART = re.compile(r'[^"\\]*')
_NUMBER_PART = re.compile(r"[-+.0-9eE]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")


class JsonScanner:
    """Scans a JSON list, object or string up to its end, or up to the first character that cannot be JSON.

    Control characters in strings are accepted, because a model writes line breaks there.

    Args:
        stop: text that begins with a bracket and is not JSON, such as `[WORD]`; scanning ends before it.

    Attributes:
        done: the value is complete.
        problem: why the value cannot be JSON, or empty.
        too_large: the value may be JSON, but exceeds a limit of this scanner.
        has_object: this value or one before it contains the start of an object.
    """

    def __init__(self, stop: str = "") -> None:
        self.done = self.has_object = self.too_large = False
        self.problem = ""
        self._stop = stop
        self._closers: list[str] = []  # closing brackets that must follow
        self._expected = "value"  # or "item" (a value or the end), "key", "first key" (or the end), "colon", "next"
        self._in_string = False
        self._escape = 0  # characters of an escape that must follow; the first decides if hex digits come
        self._number: list[str] = []

    def restart(self) -> None:
        """Prepares for another value after one that is done."""
        self.done, self._expected = False, "value"

    def read(self, text: str, at: int) -> int:
        """Scans `text` from index `at`.

        Args:
            text: the next piece, with the characters that the last call did not consume.
            at: index of the first character to scan.

        Returns:
            The index of the first character that was not consumed. It is less than the length of `text` when the value
            is done, has a problem, or ends in a partial word whose rest is needed.
        """
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
                self.problem = "a string in it has an invalid escape"
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
            if len(number) <= MAX_NUMBER and _NUMBER.fullmatch(number):
                self._end_value()
            else:
                self.too_large = len(number) > MAX_NUMBER
                self.problem = f"{number[:20]!r} does not begin a number of at most {MAX_NUMBER} characters"
        return end

    def _read_token(self, text: str, at: int) -> int:
        """Reads white space, a bracket, a comma, a colon, or the start of a value; -1 if it needs more text."""
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
            self.problem = f"{char!r} is not valid JSON at this point"
            return at
        return at + 1

    def _read_value(self, text: str, at: int) -> int:
        """Reads the start of a list, an object or a number, or a whole word; -1 if it needs more text."""
        char = text[at]
        if char in "[{":
            if char == "[" and self._stop and self._stop.startswith(text[at : at + len(self._stop)]):
                if len(text) - at < len(self._stop):
                    return -1
                self.problem = f"{self._stop!r} is not JSON"
            elif len(self._closers) == MAX_DEPTH:
                self.too_large = True
                self.problem = f"it is nested deeper than {MAX_DEPTH} brackets"
            else:
                self._closers.append("]" if char == "[" else "}")
                self._expected = "item" if char == "[" else "first key"
                self.has_object = self.has_object or char == "{"
                return at + 1
            return at
        if char in "-0123456789":
            self._number.append("")
            return at
        for word in ("true", "false", "null"):
            if text.startswith(word, at):
                self._end_value()
                return at + len(word)
            if word.startswith(text[at : at + len(word)]):
                return -1
        self.problem = f"{char!r} is not valid JSON at this point"
        return at

    def _end_value(self, expected: str = "next") -> None:
        self._expected = expected
        self.done = not self._closers


def json_text(value: Any) -> str:
    """JSON on one line, in the style that the model reads and writes.

    Raises:
        TypeError: a value has no JSON form.
        ValueError: a number is NaN or infinite, or a container contains itself.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False)

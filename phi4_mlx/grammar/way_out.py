"""phi4_mlx.grammar.way_out."""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

# Python's own reader of regular expressions, which it keeps for itself.
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

MAX_LEAST = 10_000  # tokens of the shortest answer

MAX_SEARCH_S = 1.0  # of the processor, for a way to the end; 500 properties take 0.3 s

_TRIES = 4

_LONGEST_EXAMPLE = 500  # characters

_EXAMPLES = {
    "date": b"2000-01-01",
    "time": b"00:00:00Z",
    "date-time": b"2000-01-01T00:00:00Z",
    "duration": b"P1D",
    "email": b"a@b.c",
    "hostname": b"a",
    "ipv4": b"1.1.1.1",
    "ipv6": b"::",
    "uri": b"a:b",
    "uuid": b"00000000-0000-0000-0000-000000000000",
}

_MAX_HINTS = 50

_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W",
    "CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S",
}  # fmt: skip

_MARKS = b"@.:/-T"  # they part what formats are made of


@lru_cache(maxsize=64)
def hints_of(text: str) -> tuple[bytes, ...]:
    """An example of each format and each pattern in a grammar's text; a way to its end needs them."""
    grammars = json.loads(text)["grammars"] if text.startswith("{") else []
    hints, pending = dict[bytes, None](), list(grammars)
    for each in grammars:
        whole = re.fullmatch("start: /(.*)/", each.get("lark_grammar") or "", re.DOTALL)
        if whole:
            hints[(example(whole[1].replace("\\/", "/")) or "").encode(errors="ignore")] = None
    while pending and len(hints) < _MAX_HINTS:
        value = pending.pop()
        pending += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, dict):
            names = value.get("patternProperties")
            patterns = [value.get("pattern"), *(names if isinstance(names, dict) else ())]
            for found in (example(each) for each in patterns if isinstance(each, str)):
                if found:
                    hints[json.dumps(found, ensure_ascii=False)[1:-1].encode(errors="ignore")] = None
            named = value.get("format")
            hints |= {_EXAMPLES[named]: None} if isinstance(named, str) and named in _EXAMPLES else {}
    return tuple(hints)


def example(pattern: str) -> str | None:
    """A short text that a regular expression finds itself in; None where Python cannot read it, or it is too rare."""
    try:
        return _shortest(_parser.parse(pattern))
    except (re.error, ValueError, KeyError, OverflowError, RecursionError):
        return None


def _shortest(tree: Iterable[Any]) -> str:
    """Of a parsed expression; ValueError for what it does not know."""
    text = ""
    for operation, argument in tree:
        name = str(operation)
        if name == "LITERAL":
            text += chr(argument)
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            text += _repeated(_shortest(argument[2]), argument[0])
        elif name == "SUBPATTERN":
            text += _shortest(argument[-1])
        elif name == "BRANCH":
            text += min(map(_shortest, argument[1]), key=len)
        elif name in ("IN", "NOT_LITERAL", "ANY"):
            text += _member(name, argument)
        elif name != "AT":
            raise ValueError(name)
        if len(text) > _LONGEST_EXAMPLE:
            raise ValueError("too long")
    return text


def _repeated(text: str, count: int) -> str:
    if len(text) * count > _LONGEST_EXAMPLE:  # a{4000000000} is soon written
        raise ValueError("too long")
    return text * count


def _member(name: str, argument: Any) -> str:
    """A character of a class; first those that mean nothing to JSON."""
    if name != "IN":
        return "b" if argument == ord("a") else "a"
    negated = str(argument[0][0]) == "NEGATE"
    for char in (*"a0 _-", *map(chr, range(33, 127)), *(chr(low) for kind, (low, _) in _ranges(argument))):
        if any(_holds(kind, value, char) for kind, value in argument[negated:]) != negated:
            return char
    raise ValueError("no member")


def _ranges(argument: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    for kind, value in argument:
        if str(kind) in ("RANGE", "LITERAL"):
            yield str(kind), value if str(kind) == "RANGE" else (value, value)


def _holds(kind: Any, value: Any, char: str) -> bool:
    if str(kind) == "CATEGORY":
        return re.fullmatch(_CATEGORIES[str(value)], char, re.ASCII) is not None
    return (value[0] <= ord(char) <= value[1]) if str(kind) == "RANGE" else ord(char) == value

_OUTSIDE, _INSIDE, _ESCAPED = range(3)  # of a JSON string, and behind a backslash in one


class Paths:
    """Finds ways to the end of an answer, with the tokens of a vocabulary."""

    def __init__(self, texts: Sequence[bytes], of_byte: Mapping[int, int], end: int):
        """Takes the text of each token, none for control tokens, the token of each byte, and one that ends a turn."""
        self._texts, self._of_byte, self._end = texts, of_byte, end

    def in_string(self, state: int, tokens: Iterable[int]) -> int:
        """Whether JSON is inside a string after some tokens; 0 at the start."""
        for token in tokens:
            if not self._texts[token]:
                state = _OUTSIDE  # a control token ends what was before
            for byte in self._texts[token]:
                if state == _ESCAPED:
                    state = _INSIDE
                elif byte == ord('"'):
                    state = _INSIDE if state == _OUTSIDE else _OUTSIDE
                elif byte == ord("\\") and state == _INSIDE:
                    state = _ESCAPED
        return state

    def way_out(
        self, matcher: Any, hints: Iterable[bytes] = (), state: int = _OUTSIDE, most: int = MAX_LEAST
    ) -> list[int] | None:
        """Tokens that lead from where a matcher is to where the answer may end, about as few as can be.

        Args:
            matcher: llguidance's; it stays as it is.
            hints: texts that a pattern may want, and that nobody would come to by chance.
            state: as of `in_string`.
            most: how many tokens the way may take.

        Returns:
            The tokens, without the end marker, the same for the same state; none if it may end here. None if no way is
            found, or not in time.
        """
        endings = [[self._of_byte[byte] for byte in hint[n:]] for hint in hints for n in range(len(hint))]
        give_up_at = time.thread_time() + MAX_SEARCH_S
        for dice in map(random.Random, range(_TRIES)):
            here, now, way = matcher.deep_copy(), state, list[int]()
            while len(way) <= most and not here.is_accepting() and time.thread_time() < give_up_at:
                step = here.compute_ff_tokens() or self._ending(here, endings, now != _OUTSIDE)
                step = step or self._nearest(here.compute_bitmask(), now != _OUTSIDE, dice)
                if not step or not here.consume_tokens(step):
                    break
                now = self.in_string(now, step)
                way += step
            if here.is_accepting() and not here.is_error():
                return way
        return None

    def _ending(self, matcher: Any, endings: list[list[int]], in_string: bool) -> list[int]:
        """The end of a hint that ends the string that a matcher is in, or all; nothing if none does, or none need."""
        closing = self._of_byte[ord('"')] if in_string else self._end
        if matcher.validate_tokens([closing]):
            return []
        return next((each for each in endings if matcher.validate_tokens([*each, closing]) > len(each)), [])

    def _nearest(self, mask: bytes, in_string: bool, dice: random.Random) -> list[int]:
        """The token of one byte that looks nearest to an end; by chance among equals, so that no circle holds it."""

        def allowed(chars: Iterable[int]) -> list[int]:
            found = ((byte, self._of_byte[byte]) for byte in chars if byte in self._of_byte)
            return [byte for byte, token in found if mask[token >> 3] >> (token & 7) & 1]

        def first(*choices: bytes) -> list[int]:
            return next(filter(None, map(allowed, choices)), [])

        others = allowed(byte for byte in range(32, 127) if byte not in b'"[]{},\\-')
        found = first(b'"') if in_string else first(b"}", b"]", b",", b'"') if dice.random() < 7 / 8 else []
        if not found and dice.random() < 1 / 2:
            in_number = not in_string and not any(chr(byte).isalpha() for byte in others if byte not in b"eE")
            found = first(b"0") if in_number else first(_MARKS)
        found = found or others or first(b'"', b",", b"}", b"]", b"-", b"[", b"{", b"\\")
        if found:
            return [self._of_byte[dice.choice(found)]]
        bits = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        return [int(bits[0])] if len(bits) else []

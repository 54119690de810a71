"""Example texts for the formats and regular expressions in a grammar.

A search for the end of an answer needs them, because random bytes rarely match a pattern.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

MAX_EXAMPLE = 500  # characters
MAX_EXAMPLES = 50  # of one grammar

FORMATS = {
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
_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W",
    "CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S",
}  # fmt: skip

# Python's own parser of regular expressions, which is private.
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


@lru_cache(maxsize=64)
def grammar_examples(text: str) -> tuple[bytes, ...]:
    """An example of each format and each pattern in a grammar, as bytes inside a JSON string.

    Args:
        text: a grammar in llguidance's form.
    """
    grammars = json.loads(text)["grammars"] if text.startswith("{") else []
    examples, pending = dict[bytes, None](), list(grammars)
    for grammar in grammars:
        whole = re.fullmatch("start: /(.*)/", grammar.get("lark_grammar") or "", re.DOTALL)
        if whole:
            examples[(example(whole[1].replace("\\/", "/")) or "").encode(errors="ignore")] = None
    while pending and len(examples) < MAX_EXAMPLES:
        value = pending.pop()
        pending += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, dict):
            names = value.get("patternProperties")
            patterns = [value.get("pattern"), *(names if isinstance(names, dict) else ())]
            for found in (example(pattern) for pattern in patterns if isinstance(pattern, str)):
                if found:
                    examples[json.dumps(found, ensure_ascii=False)[1:-1].encode(errors="ignore")] = None
            name = value.get("format")
            if isinstance(name, str) and name in FORMATS:
                examples[FORMATS[name]] = None
    return tuple(examples)


def example(pattern: str) -> str | None:
    """A short text that a regular expression finds a match in, or None if the expression is not supported.

    Args:
        pattern: in Python's syntax.
    """
    try:
        return _shortest(_parser.parse(pattern))
    except (re.error, ValueError, KeyError, OverflowError, RecursionError):
        return None


def _shortest(tree: Iterable[Any]) -> str:
    """A short match of a parsed expression; ValueError for an unknown operation."""
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
        if len(text) > MAX_EXAMPLE:
            raise ValueError("too long")
    return text


def _repeated(text: str, count: int) -> str:
    if len(text) * count > MAX_EXAMPLE:  # checked first: a pattern may ask for 4,000,000,000
        raise ValueError("too long")
    return text * count


def _member(name: str, argument: Any) -> str:
    """A character of a class, preferably one without a meaning in JSON."""
    if name != "IN":
        return "b" if argument == ord("a") else "a"
    negated = str(argument[0][0]) == "NEGATE"
    lowest = [chr(low) for low in _range_starts(argument)]
    candidates: list[str] = [*"a0 _-", *map(chr, range(33, 127)), *lowest]
    for char in candidates:
        if any(_matches(kind, value, char) for kind, value in argument[negated:]) != negated:
            return char
    raise ValueError("no member")


def _range_starts(argument: Any) -> Iterator[int]:
    for kind, value in argument:
        if str(kind) in ("RANGE", "LITERAL"):
            yield value[0] if str(kind) == "RANGE" else value


def _matches(kind: Any, value: Any, char: str) -> bool:
    """True if a character is in one part of a class."""
    if str(kind) == "CATEGORY":
        return re.fullmatch(_CATEGORIES[str(value)], char, re.ASCII) is not None
    low, high = value if str(kind) == "RANGE" else (value, value)
    return bool(low <= ord(char) <= high)

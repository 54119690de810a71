"""Example texts for the formats, regular expressions and multiples in a grammar.

A search for the end of an answer needs them, because random bytes rarely match a pattern.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.grammar.numbers import common_multiple, multiple

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
_COUNTED = ("multipleOf", "minimum", "maximum")
_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W",
    "CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S",
}  # fmt: skip

# Python's own parser of regular expressions, which is private.
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


@lru_cache(maxsize=64)
def grammar_examples(text: str) -> tuple[bytes, ...]:
    """An example of each format, pattern and multiple in a grammar, as bytes inside a JSON string or as a number.

    Args:
        text: a grammar in llguidance's form.
    """
    grammars = json.loads(text)["grammars"] if text.startswith("{") else []
    examples, pending, counted = dict[bytes, None](), list(grammars), list[JsonObject]()
    for grammar in grammars:
        whole = re.fullmatch("start: /(.*)/", grammar.get("lark_grammar") or "", re.DOTALL)
        if whole:
            examples[(example(whole[1].replace("\\/", "/")) or "").encode(errors="ignore")] = None
    while pending and len(examples) < MAX_EXAMPLES:
        value = pending.pop()
        pending += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, dict):
            counted.append({key: value[key] for key in _COUNTED if key in value})
            names = value.get("patternProperties")
            patterns = [value.get("pattern"), *(names if isinstance(names, dict) else ())]
            for found in (example(pattern) for pattern in patterns if isinstance(pattern, str)):
                if found:
                    examples[json.dumps(found, ensure_ascii=False)[1:-1].encode(errors="ignore")] = None
            name = value.get("format")
            if isinstance(name, str) and name in FORMATS:
                examples[FORMATS[name]] = None
    return (*examples, *_multiples(counted))


def _multiples(schemas: Iterable[JsonObject]) -> list[bytes]:
    """The multiples nearest to 0 within the bounds of each schema, and within the bounds of all together."""
    steps, bounds, found = list[Fraction](), list[JsonObject](), dict[bytes, None]()
    for schema in filter(None, schemas):
        bounds.append(schema)
        if "multipleOf" in schema:
            with contextlib.suppress(RequestError):
                steps.append(multiple(schema["multipleOf"]))
                found |= dict.fromkeys(_nearest(steps[-1], schema))
    if len({*steps}) > 1 or len(bounds) > len(steps) > 0:  # an intersection takes multiples of all
        joined = common_multiple(steps)
        for each in [{}, *bounds]:
            found |= dict.fromkeys(_nearest(joined, each))
    return list(found)[:MAX_EXAMPLES]


def _nearest(step: Fraction, bounds: JsonObject) -> Iterator[bytes]:
    """The multiples of a step next to 0 and, inwards, next to the bounds."""
    counts = {0, 1}
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # a schema in Lark is not checked
        counts = {math.ceil(Fraction(bounds["minimum"]) / step)} if "minimum" in bounds else counts
        counts |= {math.floor(Fraction(bounds["maximum"]) / step)} if "maximum" in bounds else set()
    for count in sorted(counts, key=abs):
        number = step * count
        text = format(Decimal(number.numerator) / Decimal(number.denominator), "f")
        if len(text) <= MAX_EXAMPLE:
            yield text.encode()


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

"""Numbers in a schema: bounds and constants in the range where llguidance keeps them exactly.

llguidance holds them as 64-bit floats, and an integer's bounds as int64. It rounds 2^53 + 1, has no digits for a range
that reaches 10^18 on one side only, and crashes at -2^63.

Source: llguidance 1.9.1, parser/src/json/numeric.rs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject

INT64 = 2**63  # an integer's bound at or beyond it is dropped
DIGITS = 10**18  # from here on, a range that is open at one end has no digits
LARGEST = 999_999_999_999_998_976  # the largest float below DIGITS
SMALLEST = 1e-50  # a bound nearer to 0 nests too many digits for a regular expression
MAX_LISTED = 1_000  # multiples that are listed one by one
_EASY = {str(10**n) for n in range(7)}  # steps that the last digits decide, without a state for each remainder
_BOUNDS = (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1))


def integers_only(plain: JsonObject) -> bool:
    """True if a schema's type allows integers and no other numbers."""
    kinds = plain.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return "integer" in kinds and "number" not in kinds


def set_bounds(plain: JsonObject) -> Iterator[tuple[str, str]]:
    """Replaces a schema's bounds by inclusive ones that llguidance keeps; drops those that bound nothing.

    Args:
        plain: a schema, whose bounds are numbers; changed in place. A bound that cannot be kept becomes the next
            looser one that can.

    Yields:
        (keyword, problem) for each bound that is made looser; no problem for one beyond 64 bits, which is dropped.
    """
    whole = integers_only(plain)
    limits: dict[int, tuple[str, int | float]] = {}
    for inclusive, exclusive, sign in _BOUNDS:
        found = _bound(plain, inclusive, exclusive, sign, whole)
        # What a model writes is not beyond 64 bits.
        if found is not None and sign * found[1] > -(INT64 if whole else DIGITS):
            limits[sign] = found
        elif found is not None and whole and not -INT64 <= found[1] < INT64:
            yield found[0], ""
    for inclusive, _, sign in _BOUNDS:
        if sign in limits:
            key, value = limits[sign]
            plain[inclusive] = kept = _kept(value, sign, whole, -sign in limits)
            if kept != value:
                yield key, f"the schema's {key!r} {value!r:.100} cannot be kept exactly; choose one nearer to 0"


def _bound(plain: JsonObject, inclusive: str, exclusive: str, sign: int, whole: bool) -> tuple[str, Any] | None:
    """Removes a schema's bound on one side; returns its keyword, and the bound as an inclusive one."""
    value, beyond = plain.pop(inclusive, None), plain.pop(exclusive, None)
    if beyond is True:  # as in draft 4
        value, beyond = None, value
    found: list[tuple[Any, str]] = []
    if value is not None:
        found.append(((math.ceil(value * sign) if whole else value * sign), inclusive))
    if beyond is not None and beyond is not False:
        # Numbers stay a millionth away from an exclusive bound: llguidance accepts 5 in (5, 5.5).
        away = math.floor(beyond * sign) + 1 if whole else _past(beyond * sign)
        found.append((away, exclusive))
    if not found:
        return None
    value, key = max(found, key=lambda each: each[0])
    return key, value * sign


def _past(value: int | float) -> int | float:
    """A number a little above another."""
    return value if abs(value) > DIGITS else value + max(1e-6, abs(value) * 1e-12)


def _kept(value: int | float, sign: int, whole: bool, both: bool) -> int | float:
    """The tightest bound that llguidance keeps and that excludes nothing that `value` allows."""
    value = sign * value  # as a lower bound
    limit = INT64 if whole and both else DIGITS
    if whole and sign < 0 and value == 1 - INT64:
        return sign * value  # 2^63 - 1: llguidance rounds it up to 2^63, and that down to the largest int64
    if value >= limit:
        return sign * LARGEST
    if not whole and 0 < abs(value) < SMALLEST:
        return 0 if value > 0 else -sign * SMALLEST
    near = float(value)
    if near > value:
        near = math.nextafter(near, -math.inf)
    return sign * int(near) if whole or isinstance(value, int) else sign * near


def exact_constant(value: Any, integers: bool) -> bool:
    """True if llguidance writes the numbers within a constant as they are.

    Args:
        value: a JSON value.
        integers: the schema has integers elsewhere, with which the constant might be joined.
    """
    if isinstance(value, dict):
        return all(exact_constant(each, integers) for each in value.values())
    if isinstance(value, list):
        return all(exact_constant(each, integers) for each in value)
    if not is_number(value):
        return True
    if abs(value) >= INT64 - 1024:  # llguidance clamps it to int64 if it becomes an integer
        return isinstance(value, float) and not integers
    return isinstance(value, float) or int(float(value)) == value


def is_number(value: Any) -> bool:
    """True if a JSON value is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def multiple(value: Any) -> Fraction:
    """A `multipleOf`, exactly.

    Raises:
        RequestError: it is not a number above 0, or llguidance would round it.
    """
    if not is_number(value) or not value > 0:
        raise RequestError(f"the schema's 'multipleOf' must be a number above 0, not {value!r:.100}")
    exact = Fraction(Decimal(repr(value)))
    # llguidance multiplies by 10 until no fraction is left, and holds the result in 32 bits.
    near, places = float(value) if value < 2**32 else math.inf, 0
    while near % 1 and near < 2**32:
        near, places = near * 10, places + 1
    if not near < 2**32 or places > 9 or Fraction(int(near), 10**places) != exact:
        raise RequestError(
            f"the schema's 'multipleOf' {value!r:.100} has more digits than can be counted; choose a rounder one"
        )
    return exact


def listed_multiples(plain: JsonObject) -> list[int] | None:
    """All multiples within a schema's two bounds; None unless it is of integers alone and has few.

    A list of constants is far cheaper to compile than a range whose multiples are counted.

    Args:
        plain: a schema with a `multipleOf`, whose bounds are inclusive numbers.
    """
    if plain.get("type") != "integer" or not {"minimum", "maximum"} <= plain.keys() or {"enum", "const"} & plain.keys():
        return None
    step = multiple(plain["multipleOf"]).numerator  # multiples of 1.5 that are integers are those of 3
    first, last = math.ceil(Fraction(plain["minimum"]) / step), math.floor(Fraction(plain["maximum"]) / step)
    listed = range(first * step, last * step + 1, step)
    return [*listed] if 0 <= last - first < MAX_LISTED and max(map(abs, (first, last))) * step < 2**53 else None


def common_multiple(steps: Iterable[Fraction]) -> Fraction:
    """The least common multiple of numbers from `multiple`, which have at most 9 places."""
    return Fraction(math.lcm(*(each.numerator * (10**9 // each.denominator) for each in steps)), 10**9)


def states(step: Fraction, bounds: JsonObject) -> int:
    """The states that a check of multiples of `step` takes, 5 us and 600 bytes each to compile.

    Args:
        step: the `multipleOf`.
        bounds: the schema; between two bounds every digit counts.
    """
    while step.denominator > 1:
        step *= 10
    if {"minimum", "maximum"} <= bounds.keys():
        return step.numerator * 2 * (1 + len(f"{bounds['minimum']}{bounds['maximum']}"))
    return 1 if str(step) in _EASY else step.numerator

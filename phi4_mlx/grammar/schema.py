"""JSON schemas prepared for a grammar: size limits checked, unsupported keywords refused, the rest normalised."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.tools.declarations import MAX_PROPERTIES
from phi4_mlx.tools.json_text import json_text

MAX_BYTES = 65_536
MAX_DEPTH = 64  # nested schemas
MAX_CHAIN = 200  # nested schemas with references followed; 2,000 overflow llguidance's stack
MAX_BRANCHES = 200  # alternatives that an intersection multiplies to; with 1,000 a step may exceed its limits
MAX_MULTIPLE = 100_000  # sum of all `multipleOf` without their decimal point: one state each, compiled in 3 us

_ONE = ("items", "additionalItems", "additionalProperties")
_LISTS = ("items", "prefixItems", "anyOf", "allOf", "oneOf")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
# Keywords that llguidance would ignore, or refuse without naming their place.
_REFUSED = (
    "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames",
    "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties",
    "contentSchema", "$dynamicRef", "$recursiveRef", "extends", "disallow", "divisibleBy", "x-guidance",
)  # fmt: skip
_LEAP = "0[48]|[2468][048]|[13579][26]"  # the last two digits of a leap year that is not a century
# A day in Python's calendar; llguidance's own pattern also allows year 0 and the 29th of any February.
_DAY = (
    r"^((000[1-9]|00[1-9]\d|0[1-9]\d\d|[1-9]\d{3})-(02-([01]\d|2[0-8])|(0[13-9]|1[0-2])-\d\d)"
    rf"|(\d\d({_LEAP})|({_LEAP})00)-02-29)"
)


@dataclasses.dataclass(frozen=True)
class PlainSchema:
    """A schema that llguidance can compile.

    Attributes:
        schema: a copy in which each `oneOf` of distinct constants is an `anyOf`, and each `$ref` starts from `at`.
        costly: its parts that are slow to compile, each a schema.
    """

    schema: JsonObject
    costly: list[JsonObject]


def plain_schema(schema: Any, at: str = "#", closed: bool = False) -> PlainSchema:
    """Checks a JSON schema, and returns a copy in plain form.

    Args:
        schema: a JSON schema, an object or True.
        at: the schema's future place, as a JSON pointer; its own `#` becomes this.
        closed: objects with `properties` and without `additionalProperties` allow no others.

    Raises:
        RequestError: it is not a schema, is too large, or uses a keyword that a grammar cannot enforce; names it.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise RequestError(f"a schema must be an object, not {schema!r:.100}")
    try:
        text = json_text(schema)
        size = len(text.encode())
    except UnicodeEncodeError:
        raise RequestError("the schema contains half a surrogate pair, which is not text; remove it") from None
    except (TypeError, ValueError) as error:
        raise RequestError(f"a schema must be JSON: {error}") from None
    except RecursionError:
        raise RequestError(f"the schema is nested deeper than {MAX_DEPTH}; make it flatter") from None
    if size > MAX_BYTES:
        raise RequestError(f"the schema has {size:,} bytes, and the limit is {MAX_BYTES:,}; make it smaller")
    root = json.loads(text)
    walk = _Walk(root, at)
    try:
        chain = walk.chain(root)
        plain = walk.copy(root, 0, closed)
    except RecursionError:
        chain = MAX_CHAIN + 1
    if chain > MAX_CHAIN:
        raise RequestError(f"the schema's references nest more than {MAX_CHAIN} schemas deep; make it flatter")
    for dropped in ("$id", "$schema"):  # unused by references, but llguidance would resolve them
        plain.pop(dropped, None)
    if walk.properties > MAX_PROPERTIES:
        raise RequestError(
            f"the schema has {walk.properties:,} properties, and the limit is {MAX_PROPERTIES}; leave some out"
        )
    if walk.multiples > MAX_MULTIPLE:
        raise RequestError(
            f"the schema's multipleOf values add up to {walk.multiples:,} without decimal points, and the limit is "
            f"{MAX_MULTIPLE:,}; choose rounder ones"
        )
    return PlainSchema(plain, walk.costly)


class _Walk:
    """One pass over a schema, which counts and copies."""

    def __init__(self, root: JsonObject, at: str):
        self._root, self._at = root, at
        self._branches: dict[int, int] = {}
        self._chains: dict[int, int] = {}
        self.properties = self.multiples = 0
        self.costly: list[JsonObject] = []

    def copy(self, given: Any, depth: int, closed: bool) -> Any:
        """The plain form of `given`; `closed` as in `plain_schema`."""
        if isinstance(given, bool):
            return given
        if not isinstance(given, dict):
            raise RequestError(f"a schema must be an object, not {given!r:.100}")
        if depth > MAX_DEPTH:
            raise RequestError(f"the schema is nested deeper than {MAX_DEPTH}; make it flatter")
        plain = {key: value for key, value in given.items() if (key, value) != ("uniqueItems", False)}
        self._check(plain, depth)
        if isinstance(plain.get("oneOf"), list) and "anyOf" not in plain and _distinct(plain["oneOf"]):
            plain["anyOf"] = plain.pop("oneOf")
        if plain.get("type") != "integer":
            for key, bound, sign in (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1)):
                _include(plain, key, bound, sign)
        if plain.get("format") in ("date", "date-time"):
            plain.setdefault("pattern", _DAY)
        self.count_branches(given)
        alone = not plain.keys() & {"anyOf", "allOf", "oneOf", "$ref", "patternProperties"}
        if closed and alone and "properties" in plain:
            plain.setdefault("additionalProperties", False)
        for key, value in plain.items():
            joined = key in ("$defs", "definitions", "allOf") or (key in ("anyOf", "oneOf") and "properties" in plain)
            within = closed and not joined  # if closed, it would refuse the properties of the schemas it is joined with
            if key in _MAPS and isinstance(value, dict):
                plain[key] = {name: self.copy(each, depth + 1, within) for name, each in value.items()}
            elif key in _LISTS and isinstance(value, list):
                plain[key] = [self.copy(each, depth + 1, within) for each in value]
            elif key in _ONE:
                plain[key] = self.copy(value, depth + 1, within)
        return plain

    def chain(self, schema: Any) -> int:
        """The longest chain of nested schemas from this one, with each reference followed once."""
        if not isinstance(schema, dict):
            return 0
        if id(schema) not in self._chains:
            self._chains[id(schema)] = 0  # ends a cycle of references
            inner = [schema[key] for key in _ONE if key in schema]
            inner += [each for key in _LISTS if isinstance(schema.get(key), list) for each in schema[key]]
            inner += [each for key in _MAPS if isinstance(schema.get(key), dict) for each in schema[key].values()]
            if isinstance(schema.get("$ref"), str):
                inner.append(self._pointed_at(schema["$ref"]))
            self._chains[id(schema)] = 1 + max(map(self.chain, inner), default=0)
        return self._chains[id(schema)]

    def count_branches(self, schema: Any) -> int:
        """The alternatives that a schema has in an intersection; refuses a product over the limit."""
        if not isinstance(schema, dict):
            return 1
        if id(schema) in self._branches:
            return self._branches[id(schema)]
        self._branches[id(schema)] = 1  # ends a cycle of references
        inner = [value for key in _MAPS[:2] if isinstance(schema.get(key), dict) for value in schema[key].values()]
        inner += [schema[key] for key in _ONE if key in schema]
        own = (2 if "pattern" in schema else 1) + sum(self.count_branches(each) - 1 for each in inner)
        either = [schema[key] for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list)]
        both = schema["allOf"] if isinstance(schema.get("allOf"), list) else []
        parts = [own, *(sum(map(self.count_branches, each)) for each in either), *map(self.count_branches, both)]
        if isinstance(schema.get("$ref"), str):
            parts.append(self.count_branches(self._pointed_at(schema["$ref"])))
        product = math.prod(max(1, part) for part in parts)
        if product > MAX_BRANCHES and sum(part > 1 for part in parts) > 1:
            raise RequestError(
                f"the schema joins alternatives (anyOf, pattern within allOf) to {product:,} combinations, and the "
                f"limit is {MAX_BRANCHES:,}; join fewer"
            )
        self._branches[id(schema)] = product
        return product

    def _check(self, plain: JsonObject, depth: int) -> None:
        """Refuses keywords that a grammar cannot enforce, counts properties, and moves references to `at`."""
        for key in plain:
            if key in _REFUSED:
                raise RequestError(f"the schema uses {key!r}, which a grammar cannot enforce; leave it out")
        if depth and "$id" in plain:
            raise RequestError("the schema has a nested '$id'; leave it out, and refer to '#/$defs/NAME'")
        if "$ref" in plain:
            reference = plain["$ref"]
            if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
                raise RequestError(
                    f"the schema's '$ref' {reference!r:.100} is outside it, and nothing is fetched; refer to "
                    "'#/$defs/NAME' within it"
                )
            plain["$ref"] = self._at + reference[1:]
        names = plain.get("properties")
        self.properties += len(names) if isinstance(names, dict) else 0
        required = plain.get("required")
        least, known = plain.get("minProperties", 0), len(required) if isinstance(required, list) else 0
        if isinstance(least, int) and least > known + 1:  # a free key may come twice
            raise RequestError(
                f"the schema uses 'minProperties' {least} with {known} required; name those properties in 'required'"
            )
        self._note_costly(plain)

    def _note_costly(self, plain: JsonObject) -> None:
        """Collects the parts that are slow to compile, and sums `multipleOf`."""
        if "multipleOf" in plain:
            value = plain["multipleOf"]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise RequestError(f"the schema's 'multipleOf' must be a number above 0, not {value!r:.100}")
            self.multiples += int("".join(map(str, Decimal(str(value)).normalize().as_tuple().digits)))
        if "pattern" in plain:
            kept = ("pattern", "minLength", "maxLength", "format")
            self.costly.append({"type": "string", **{key: plain[key] for key in kept if key in plain}})
        patterns = plain.get("patternProperties")
        self.costly += [{"type": "string", "pattern": each} for each in patterns] if isinstance(patterns, dict) else []

    def _pointed_at(self, reference: str) -> Any:
        found: Any = self._root
        for part in reference.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list):
                number = int(part) if part.isdecimal() and len(part) < 10 else len(found)
                found = found[number] if number < len(found) else None
            else:
                found = found.get(part) if isinstance(found, dict) else None
        return found


def _include(plain: JsonObject, exclusive: str, inclusive: str, sign: int) -> None:
    """Replaces an exclusive bound by an inclusive one at the next value; llguidance accepts 5 in (5, 5.5)."""
    value, bound = plain.get(exclusive), plain.get(inclusive)
    if value is True:  # as in draft 4
        value, bound = bound, None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    del plain[exclusive]
    try:
        next_to = value + sign * max(1e-6, abs(value) * 1e-12)
    except OverflowError:
        raise RequestError(f"the schema's {exclusive!r} has over 300 digits; choose a smaller number") from None
    if isinstance(bound, (int, float)) and not isinstance(bound, bool):
        next_to = max(next_to, bound) if sign > 0 else min(next_to, bound)
    plain[inclusive] = next_to


def _distinct(branches: list[Any]) -> bool:
    """True if the branches list their values and share none, so that at most one branch matches."""
    values: list[str] = []
    for branch in branches:
        if isinstance(branch, dict) and "const" in branch:
            values.append(_canonical(branch["const"]))
        elif isinstance(branch, dict) and isinstance(branch.get("enum"), list):
            values += {_canonical(each) for each in branch["enum"]}
        else:
            return False
    return len(values) == len(set(values))


def _canonical(value: Any) -> str:
    """The same text for all spellings of a JSON value: 1 and 1.0 are the same number."""

    def plain(each: Any) -> Any:
        if isinstance(each, dict):
            return {key: plain(one) for key, one in each.items()}
        if isinstance(each, list):
            return [plain(one) for one in each]
        return int(each) if isinstance(each, float) and each.is_integer() else each

    return json.dumps(plain(value), sort_keys=True)

"""JSON schemas prepared for a grammar: limits checked, keywords refused or left out, the rest normalised.

A keyword that a grammar cannot enforce, or cannot enforce exactly, is refused if the schema is strict. Otherwise it is
left out and reported: the answer obeys the rest.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.grammar.compiler import TooComplex
from phi4_mlx.grammar.keywords import (
    ANNOTATIONS,
    LISTS,
    MAPS,
    NOT_ENFORCED,
    ONE,
    compiles,
    known_format,
    malformed,
    plain_pattern,
)
from phi4_mlx.grammar.numbers import common_multiple, exact_constant, listed_multiples, multiple, set_bounds, states
from phi4_mlx.tools.json_text import json_text

MAX_BYTES = 65_536
MAX_DEPTH = 64  # nested schemas
MAX_CHAIN = 200  # nested schemas with references followed; 2,000 overflow llguidance's stack
MAX_BRANCHES = 200  # alternatives that an intersection multiplies to; with 1,000 a step may exceed its limits
MAX_PAIRS = 50_000  # of optional properties, in objects with `minProperties`: llguidance lists the rest for each
MAX_MULTIPLE = 100_000  # states of all `multipleOf` together, each compiled in 5 us

# Keywords that make one schema an intersection, if it has others that restrict.
_JOINING = {"anyOf", "oneOf", "allOf", "$ref", "patternProperties"}
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
        schema: a copy in which each `oneOf` of disjoint schemas is an `anyOf`, and each `$ref` starts from `at`.
        costly: its parts that are slow to compile, each a schema.
        loosened: the keywords that were left out or made looser, in their order.
        states: of all `multipleOf`, at most `MAX_MULTIPLE`.
    """

    schema: JsonObject
    costly: list[JsonObject]
    loosened: tuple[str, ...] = ()
    states: int = 0


def plain_schema(
    schema: Any, at: str = "#", closed: bool = False, strict: bool = True, lenient: bool = False
) -> PlainSchema:
    """Checks a JSON schema, and returns a copy in plain form.

    Args:
        schema: a JSON schema, an object or True.
        at: the schema's future place, as a JSON pointer; its own `#` becomes this.
        closed: objects with `properties` and without `additionalProperties` allow no others.
        strict: refuses a keyword that cannot be enforced; otherwise it is left out.
        lenient: leaves out a keyword whose value is malformed, or a number that cannot be kept exactly, too.

    Raises:
        RequestError: it is not a schema, is malformed, or uses a keyword that a grammar cannot enforce; names it.
        TooComplex: it is too large or too deep, or joins too many alternatives.
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
        raise TooComplex(f"the schema is nested deeper than {MAX_DEPTH}; make it flatter") from None
    if size > MAX_BYTES:
        raise TooComplex(f"the schema has {size:,} bytes, and the limit is {MAX_BYTES:,}; make it smaller")
    root = json.loads(text)
    walk = _Walk(root, at, strict, lenient, '"integer"' in text)
    try:
        chain = walk.paths.chain(root)
        plain = walk.copy(root, 0, closed)
    except RecursionError:
        chain = MAX_CHAIN + 1
    if chain > MAX_CHAIN:
        raise TooComplex(f"the schema's references nest more than {MAX_CHAIN} schemas deep; make it flatter")
    return PlainSchema(plain, walk.costly, tuple(walk.loosened), walk.states)


class _Walk:
    """One pass over a schema, which checks and copies."""

    def __init__(self, root: JsonObject, at: str, strict: bool, lenient: bool, integers: bool):
        self.paths = _Paths(root)
        self._at, self._strict, self._lenient, self._integers = at, strict, lenient, integers
        self._steps: list[Fraction] = []  # all `multipleOf`
        self._pairs = self.states = 0
        self.costly: list[JsonObject] = []
        self.loosened: dict[str, None] = {}

    def copy(self, given: Any, depth: int, closed: bool) -> Any:
        """The plain form of `given`; `closed` as in `plain_schema`."""
        if isinstance(given, bool):
            return given
        if not isinstance(given, dict):
            if not self._lenient:
                raise RequestError(f"a schema must be an object, not {given!r:.100}")
            self.loosened[f"{given!r:.20} for a schema"] = None
            return {}
        if depth > MAX_DEPTH:
            raise TooComplex(f"the schema is nested deeper than {MAX_DEPTH}; make it flatter")
        plain = {key: value for key, value in given.items() if key not in ANNOTATIONS}
        self._check_form(plain)
        self._check_keywords(plain, depth)
        self._check_reference(plain)
        self._check_string(plain)
        self._check_numbers(plain)
        self._check_object(plain)
        self._check_alternatives(plain)
        self.paths.count_branches(given)
        alone = not plain.keys() & _JOINING
        if closed and alone and "properties" in plain and {*plain.get("required", ())} <= plain["properties"].keys():
            plain.setdefault("additionalProperties", False)
        for key, value in plain.items():
            joined = key in ("$defs", "definitions", "allOf") or (key in ("anyOf", "oneOf") and "properties" in plain)
            within = closed and not joined  # if closed, it would refuse the properties of the schemas it is joined with
            if key in MAPS:
                plain[key] = {name: self.copy(each, depth + 1, within) for name, each in value.items()}
            elif key in LISTS and isinstance(value, list):
                plain[key] = [self.copy(each, depth + 1, within) for each in value]
            elif key in ONE:
                plain[key] = self.copy(value, depth + 1, within)
        return plain

    def _leave_out(self, plain: JsonObject, key: str, message: str) -> None:
        """Leaves out a keyword that a grammar cannot enforce.

        Raises:
            RequestError: the schema is strict.
        """
        if self._strict:
            raise RequestError(message)
        plain.pop(key, None)
        self.loosened[key] = None

    def _refuse_number(self, message: str) -> None:
        """Refuses a number that cannot be kept exactly, where the answer would then have another one."""
        if not self._lenient:
            raise RequestError(message)

    def _check_form(self, plain: JsonObject) -> None:
        for key, value in list(plain.items()):
            if key not in plain or (message := malformed(key, value)) is None:
                continue
            if not self._lenient:
                raise RequestError(message)
            del plain[key]
            self.loosened[key] = None
            if key in ("properties", "patternProperties"):
                plain.pop("additionalProperties", None)  # which would refuse these
            elif key == "prefixItems":
                plain.pop("items", None)

    def _check_keywords(self, plain: JsonObject, depth: int) -> None:
        """Leaves out the keywords that a grammar cannot enforce."""
        for key in NOT_ENFORCED:
            if key in plain and (key, plain[key]) != ("uniqueItems", False):
                message = f"the schema uses {key!r}, which a grammar cannot enforce; leave it out"
                self._leave_out(plain, key, message)
        plain.pop("uniqueItems", None)
        if depth and "$id" in plain:
            self._leave_out(plain, "$id", "the schema has a nested '$id'; leave it out, and refer to '#/$defs/NAME'")
        plain.pop("$id", None)
        if not all(exact_constant(plain[key], self._integers) for key in ("enum", "const") if key in plain):
            for key in [key for key in ("enum", "const") if key in plain]:
                values = plain[key] if key == "enum" else [plain[key]]
                message = f"the schema's {key!r} has a number that cannot be kept exactly; choose one nearer to 0"
                self._refuse_number(message)
                self._leave_out(plain, key, message)
                if all(type(each) is int for each in values):
                    plain.setdefault("type", "integer")

    def _check_reference(self, plain: JsonObject) -> None:
        """Moves a reference to `at`."""
        if "$ref" not in plain:
            return
        reference = plain["$ref"]
        if not (reference == "#" or reference.startswith("#/")):
            message = f"the schema's '$ref' {reference!r:.100} is outside it, and nothing is fetched; refer to "
            self._leave_out(plain, "$ref", message + "'#/$defs/NAME' within it")
        elif not self.paths.leads_to_schema(reference):
            message = f"the schema's '$ref' {reference!r:.100} leads to no schema within it; refer to '#/$defs/NAME'"
            self._leave_out(plain, "$ref", message)
        else:
            plain["$ref"] = self._at + reference[1:]

    def _check_string(self, plain: JsonObject) -> None:
        """Drops unknown formats, which are annotations, and collects the strings that are slow to compile."""
        if "format" in plain and not known_format(plain["format"]):
            del plain["format"]
        if plain.get("format") in ("date", "date-time"):
            plain.setdefault("pattern", _DAY)
        if "pattern" in plain:
            plain["pattern"] = plain_pattern(plain["pattern"])
            kept = ("pattern", "minLength", "maxLength", "format")
            part = {"type": "string", **{key: plain[key] for key in kept if key in plain}}
            if self._strict or compiles(part):
                self.costly.append(part)
            else:
                self._leave_out(plain, "pattern", "")
        patterns = plain.get("patternProperties", {})
        named = {"type": "object", "patternProperties": dict.fromkeys(patterns, True)}
        if patterns and not self._strict and not compiles(named):
            self._leave_out(plain, "patternProperties", "")
            plain.pop("additionalProperties", None)
        elif patterns:
            self.costly += [{"type": "string", "pattern": each} for each in patterns]

    def _check_numbers(self, plain: JsonObject) -> None:
        """Sets bounds that are kept exactly, and sums the states of `multipleOf`."""
        for key, message in set_bounds(plain):
            if message:
                self._refuse_number(message)
            self.loosened[key] = None
        if "multipleOf" not in plain:
            return
        try:
            step = multiple(plain["multipleOf"])
        except RequestError as error:
            self._leave_out(plain, "multipleOf", str(error))
            return
        if not self.paths.together and (listed := listed_multiples(plain)):
            for key in ("multipleOf", "minimum", "maximum"):
                del plain[key]
            plain["enum"] = listed
            return
        if self.paths.together:  # the states of all multiply
            count = max(states(common_multiple({step, *self._steps}), plain), self.states)
        else:
            count = self.states + states(step, plain)
        if count > MAX_MULTIPLE:
            message = f"the schema's 'multipleOf' values take {count:,} states, and the limit is {MAX_MULTIPLE:,}"
            self._leave_out(plain, "multipleOf", f"{message}; choose rounder ones or fewer")
        else:
            self._steps.append(step)
            self.states = count

    def _check_object(self, plain: JsonObject) -> None:
        """Leaves out a count of properties that a grammar cannot keep."""
        names, required = plain.get("properties", {}), plain.get("required", [])
        least = plain.get("minProperties", 0)
        if least > len(required) + 1:  # a free key may come twice
            message = f"the schema uses 'minProperties' {least} with {len(required)} required; name those properties"
            self._leave_out(plain, "minProperties", f"{message} in 'required'")
        if least:
            optional = self.paths.named if self.paths.joins else len(names.keys() - {*required})
            self._pairs += optional**2
            if self._pairs > MAX_PAIRS:
                message = f"the schema uses 'minProperties' {least} with {optional:,} properties; leave it out"
                self._leave_out(plain, "minProperties", message)
        if not self._strict and not names.keys() <= {*required}:
            for key in [key for key in ("minProperties", "maxProperties") if key in plain]:
                self._leave_out(plain, key, "")

    def _check_alternatives(self, plain: JsonObject) -> None:
        """Makes `oneOf` an `anyOf`, if at most one branch can match or the schema is not strict."""
        if "oneOf" not in plain:
            return
        if not self.paths.distinct(plain["oneOf"]):
            if self._strict:
                return  # llguidance sees more, and refuses it if need be
            self.loosened["oneOf"] = None
        branches = plain.pop("oneOf")
        if "anyOf" in plain:
            plain["allOf"] = [*plain.get("allOf", ()), {"anyOf": branches}]
        else:
            plain["anyOf"] = branches


class _Paths:
    """The references of a schema, followed: chains, intersections and alternatives."""

    def __init__(self, root: JsonObject):
        self._root = root
        self._branches: dict[int, int] = {}
        self._chains: dict[int, int] = {}
        aside = {*ANNOTATIONS, "$id", "$defs", "definitions"}
        self.joins = any(
            "allOf" in each or (_JOINING & each.keys() and len(each.keys() - aside) > 1) for each in _objects(root)
        )
        self.together = any(_JOINING & each.keys() for each in _objects(root))
        self.named = sum(len(each["properties"]) for each in _objects(root) if isinstance(each.get("properties"), dict))

    def chain(self, schema: Any) -> int:
        """The longest chain of nested schemas from this one, with each reference followed once."""
        if not isinstance(schema, dict):
            return 0
        if id(schema) not in self._chains:
            self._chains[id(schema)] = 0  # ends a cycle of references
            inner = [schema[key] for key in ONE if key in schema]
            inner += [each for key in LISTS if isinstance(schema.get(key), list) for each in schema[key]]
            inner += [each for key in MAPS if isinstance(schema.get(key), dict) for each in schema[key].values()]
            if isinstance(schema.get("$ref"), str):
                inner.append(self.pointed_at(schema["$ref"]))
            self._chains[id(schema)] = 1 + max(map(self.chain, inner), default=0)
        return self._chains[id(schema)]

    def count_branches(self, schema: Any) -> int:
        """The alternatives that a schema has in an intersection; refuses a product over the limit."""
        if not isinstance(schema, dict):
            return 1
        if id(schema) in self._branches:
            return self._branches[id(schema)]
        self._branches[id(schema)] = 1  # ends a cycle of references
        inner = [value for key in MAPS[:2] if isinstance(schema.get(key), dict) for value in schema[key].values()]
        inner += [schema[key] for key in ONE if key in schema]
        own = (2 if "pattern" in schema else 1) + sum(self.count_branches(each) - 1 for each in inner)
        either = [schema[key] for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list)]
        both = schema["allOf"] if isinstance(schema.get("allOf"), list) else []
        parts = [own, *(sum(map(self.count_branches, each)) for each in either), *map(self.count_branches, both)]
        if isinstance(schema.get("$ref"), str):
            parts.append(self.count_branches(self.pointed_at(schema["$ref"])))
        product = math.prod(max(1, part) for part in parts)
        if product > MAX_BRANCHES and sum(part > 1 for part in parts) > 1:
            raise TooComplex(
                f"the schema joins alternatives (anyOf, pattern within allOf) to {product:,} combinations, and the "
                f"limit is {MAX_BRANCHES:,}; join fewer"
            )
        self._branches[id(schema)] = product
        return product

    def pointed_at(self, reference: str) -> Any:
        """The part of the schema that a JSON pointer names; None if there is none."""
        found: Any = self._root
        for part in reference.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list):
                number = int(part) if part.isdecimal() and len(part) < 10 else len(found)
                found = found[number] if number < len(found) else None
            else:
                found = found.get(part, found.get(unquote(part))) if isinstance(found, dict) else None
        return found

    def leads_to_schema(self, reference: str) -> bool:
        """True if a reference leads to a schema, at once or over others; a circle of references leads to none."""
        seen, found = set[str](), self.pointed_at(reference)
        while isinstance(found, dict) and isinstance(found.get("$ref"), str) and reference not in seen:
            seen.add(reference)
            reference = found["$ref"]
            found = self.pointed_at(reference)
        return isinstance(found, (dict, bool)) and reference not in seen

    def distinct(self, branches: list[Any]) -> bool:
        """True if at most one branch can match: they list other values, or differ in the value of a property."""
        values = [self._values(branch) for branch in branches]
        if None not in values:
            return _disjoint(values)
        tags = [self._tags(branch) for branch in branches]
        return any(_disjoint([tag.get(name) for tag in tags]) for name in (tags[0] if tags else ()))

    def _values(self, branch: Any) -> set[str] | None:
        """The values that a branch lists; None if it lists none."""
        if isinstance(branch, dict) and isinstance(branch.get("$ref"), str):
            branch = self.pointed_at(branch["$ref"])
        if isinstance(branch, dict) and "const" in branch:
            return {_canonical(branch["const"])}
        if isinstance(branch, dict) and isinstance(branch.get("enum"), list):
            return {_canonical(each) for each in branch["enum"]}
        return None

    def _tags(self, branch: Any) -> dict[str, set[str] | None]:
        """The required properties of an object whose values are listed, with these values."""
        if isinstance(branch, dict) and isinstance(branch.get("$ref"), str):
            branch = self.pointed_at(branch["$ref"])
        if not isinstance(branch, dict) or branch.get("type") != "object":
            return {}
        names, required = branch.get("properties"), branch.get("required")
        if not isinstance(names, dict) or not isinstance(required, list):
            return {}
        return {name: self._values(each) for name, each in names.items() if name in required}


def _objects(schema: JsonObject) -> Iterator[JsonObject]:
    """All objects within a schema."""
    pending: list[Any] = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield value
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _disjoint(values: list[set[str] | None]) -> bool:
    return all(values) and len(set[str]().union(*filter(None, values))) == sum(len(each or ()) for each in values)


def _canonical(value: Any) -> str:
    """The same text for all spellings of a JSON value: 1 and 1.0 are the same number."""

    def plain(each: Any) -> Any:
        if isinstance(each, dict):
            return {key: plain(one) for key, one in each.items()}
        if isinstance(each, list):
            return [plain(one) for one in each]
        return int(each) if isinstance(each, float) and each.is_integer() else each

    return json.dumps(plain(value), sort_keys=True)

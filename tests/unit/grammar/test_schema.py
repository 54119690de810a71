"""JSON schemas: which are refused and how, which are normalised, and classes as schemas."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.grammar.compiler import check_grammar
from phi4_mlx.grammar.grammars import json_schema, tool_calls
from phi4_mlx.grammar.schema import plain_schema
from phi4_mlx.tools.hints import class_schema
from tests.json_schemas import STRING, obj


def deep(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = STRING
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


def row(link: str, count: int, backwards: bool = False) -> dict[str, Any]:
    """A chain of definitions, each of which refers to the next."""
    links = [(str(n), json.loads(link.replace("NEXT", f"#/$defs/{n + 1}"))) for n in range(count)]
    links.append((str(count), {}))
    return {"$defs": dict(reversed(links) if backwards else links), "$ref": "#/$defs/0"}


@pytest.fixture(scope="module")
def largest_s() -> float:
    """Seconds of processor time to check a schema with 500 properties."""
    check_grammar.cache_clear()
    start = time.process_time()
    json_schema(obj({f"p{n}": STRING for n in range(500)}))
    return time.process_time() - start


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (["a"], "a schema must be an object"),
        (False, "a schema must be an object"),
        ("{}", "a schema must be an object"),
        ({"minimum": float("nan")}, "must be JSON"),
        ({"const": {1, 2}}, "must be JSON"),
        ({"const": "\ud800"}, "half a surrogate pair"),
        ({"description": "x" * 70_000}, r"70,019 bytes.*65,536"),
        (deep(65), "deeper than 64"),
        (deep(5_000), "deeper than 64"),
        ({"properties": {"a": 5}}, "a schema must be an object, not 5"),
        ({"$ref": "https://example.com/s.json"}, "is outside it.*nothing is fetched"),
        ({"$ref": "other.json#/a"}, "is outside it"),
        ({"$ref": "#name"}, "is outside it"),
        ({"$ref": "#/$defs/none"}, "leads to no schema"),
        ({"$defs": {"a": {"$id": "b", **STRING}}}, "nested '\\$id'"),
        *[
            (obj({"a": {keyword: value}}), f"'{keyword.replace('$', '.')}'")
            for keyword, value in {
                "not": STRING,
                "if": STRING,
                "then": STRING,
                "else": STRING,
                "uniqueItems": True,
                "contains": STRING,
                "minContains": 1,
                "maxContains": 1,
                "propertyNames": STRING,
                "dependentRequired": {},
                "dependencies": {},
                "dependentSchemas": {},
                "unevaluatedItems": False,
                "unevaluatedProperties": False,
                "$dynamicRef": "#a",
                "$recursiveRef": "#",
                "x-guidance": {"lenient": True},
                "disallow": "string",
                "extends": {},
                "divisibleBy": 2,
                "contentSchema": {},
            }.items()
        ],
        ({"$defs": {"unused": {"not": STRING}}, **STRING}, "'not'"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "oneOf"),
        ({"type": "strange"}, "'type' must be one or more of null.*not 'strange'"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "Unsatisfiable"),
        (obj({"a": False}, "a"), "Unsatisfiable"),
        ({"enum": []}, "Unsatisfiable"),
        (obj({"a": STRING, "b": STRING, "c": STRING}, minProperties=2), "'minProperties' 2 with 0 required"),
        (obj({"a": STRING, "b": STRING}, maxProperties=1, minProperties=True), "minProperties"),
        (obj({f"p{n}": STRING for n in range(300)}, minProperties=1), "'minProperties' 1 with 300 properties"),
        (
            {"$ref": "#/$defs/a", "minProperties": 1, "$defs": {"a": obj({f"p{n}": STRING for n in range(300)})}},
            "'minProperties' 1 with 300 properties",
        ),
        ({"type": "object", "patternProperties": {"^a": STRING, "b": {"type": "integer"}}}, "disjoint"),
        ({"type": "integer", "multipleOf": 0}, "'multipleOf' must be a number above 0"),
        ({"type": "integer", "multipleOf": 123_457}, "take 123,457 states.*100,000"),
        ({"allOf": [{"anyOf": [obj({f"p{n}{m}": STRING}) for m in range(4)]} for n in range(6)]}, "4,096 combinations"),
        ({"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}c"} for n in range(12)]}, "4,096 combinations"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "leads to no schema"),
        ({"$ref": "#/$defs/a", "$defs": {"a": obj({"c": {"$ref": "#/$defs/a"}}, "c")}}, "never end"),
        ({"const": "\x01"}, "never end"),
        ({"type": "number", "exclusiveMinimum": 10**400}, "'exclusiveMinimum' 1000.*cannot be kept exactly"),
        ({"anyOf": [STRING], "$ref": "#/anyOf/" + "9" * 5_000}, "leads to no schema"),
        (row('{"items": {"$ref": "NEXT"}}', 300), "200 schemas deep"),
        (row('{"anyOf": [{"$ref": "NEXT"}]}', 1_000), "200 schemas deep"),
        (row('{"properties": {"a": {"$ref": "NEXT"}}}', 900, backwards=True), "200 schemas deep"),
        (row('{"prefixItems": [{"$ref": "NEXT"}]}', 900, backwards=True), "200 schemas deep"),
        ({"type": "string", "minLength": 20_000}, "obeyed by no answer of up to 10,000"),
    ],
)
def test_an_unsupported_schema_is_refused(schema: Any, message: str, largest_s: float) -> None:
    start = time.process_time()
    with pytest.raises(RequestError, match=message) as caught:
        json_schema(schema)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert time.process_time() - start < 100 * largest_s


def test_a_chain_of_references_may_be_long() -> None:
    json_schema(row('{"items": {"$ref": "NEXT"}}', 90))
    json_schema({"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"})


def test_the_given_schema_is_not_changed() -> None:
    schema = {"oneOf": [{"const": 1}, {"const": 2}], "$defs": {"a": obj({"b": {"$ref": "#"}})}}
    before = json.dumps(schema)
    assert plain_schema(schema, at="#/$defs/t0", closed=True).schema != schema
    tool_calls([{"name": "f", "parameters": obj({"x": schema["oneOf"][0]})}])
    assert json.dumps(schema) == before


def test_references_move_with_the_schema() -> None:
    schema = obj(
        {"a": {"$ref": "#"}, "b": {"$ref": "#/$defs/c"}}, **{"$defs": {"c": STRING}, "$id": "x", "$schema": "y"}
    )
    plain = plain_schema(schema, at="#/$defs/t3").schema
    assert plain["properties"] == {"a": {"$ref": "#/$defs/t3"}, "b": {"$ref": "#/$defs/t3/$defs/c"}}
    assert not {"$id", "$schema"} & plain.keys()


def test_only_objects_that_stand_alone_are_closed() -> None:
    inner = obj({"x": STRING})
    schema = obj({"a": inner, "b": {"anyOf": [inner, STRING]}, "c": {"allOf": [inner, inner]}, "d": {"type": "object"}})
    plain = plain_schema(schema, closed=True).schema
    assert plain["additionalProperties"] is False and plain["properties"]["a"]["additionalProperties"] is False
    assert plain["properties"]["b"]["anyOf"][0]["additionalProperties"] is False
    assert all("additionalProperties" not in part for part in plain["properties"]["c"]["allOf"])
    assert plain["properties"]["d"] == {"type": "object"}
    assert "additionalProperties" not in plain_schema(schema).schema


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Point:
    x: float
    y: float = 0.0


@dataclass
class Everything:
    point: Point
    either: Point | str | None
    colour: Colour
    pair: tuple[int, Point]
    many: tuple[Point, ...]
    by_name: dict[str, Point]
    size: Annotated[Literal["s", "m"], "How big"]
    number: int | float
    rest: list[Any] = field(default_factory=list)


def test_an_answer_becomes_an_instance_of_its_dataclass() -> None:
    schema, read = class_schema(Everything)
    assert schema["required"] == ["point", "either", "colour", "pair", "many", "by_name", "size", "number"]
    json_schema(schema, closed=True)
    point: dict[str, Any] = {"x": 1}
    answer = {
        "point": point, "either": {"x": 2, "y": 3}, "colour": "blue", "pair": [4, point], "many": [point],
        "by_name": {"a": point}, "size": "m", "number": 5,
    }  # fmt: skip
    made = read(json.dumps(answer))
    assert made == Everything(
        Point(1.0), Point(2.0, 3.0), Colour.BLUE, (4, Point(1.0)), (Point(1.0),), {"a": Point(1.0)}, "m", 5
    )
    assert isinstance(made.point.x, float) and isinstance(made.number, int)
    assert read(json.dumps(answer | {"either": "text"})).either == "text"
    assert read(json.dumps(answer | {"either": None, "rest": [{"x": 1}]})).rest == [{"x": 1}]


@dataclass
class Odd:
    handle: bytes


@pytest.mark.parametrize("kind", [int, 5, "x", None, [Point], Point(1.0)])
def test_a_value_that_is_not_a_schema_is_refused(kind: Any) -> None:
    with pytest.raises(RequestError, match="must be a JSON schema, a dataclass or a pydantic model"):
        class_schema(kind)


def test_a_field_without_a_schema_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match=r"dataclass Odd: .*handle.*bytes"):
        class_schema(Odd)

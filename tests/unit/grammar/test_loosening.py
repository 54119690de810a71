"""Keywords that a grammar cannot enforce: left out and reported, or refused where the schema is strict."""

from __future__ import annotations

import decimal
import enum
import json
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.grammar.grammars import class_answer, json_schema, tool_calls
from phi4_mlx.grammar.schema import plain_schema
from tests.json_schemas import STRING, accepts, obj

REMOTE = {"$ref": "https://example.com/s.json"}
# (the schema of an argument, the keyword that is left out)
LOOSENED: list[tuple[dict[str, Any], str]] = [
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    ({"type": "array", "items": STRING, "uniqueItems": True}, "uniqueItems"),
    ({"not": {}}, "not"),
    ({"if": {"const": 1}, "then": STRING, "else": {}}, "if"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
    ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
    ({"type": "array", "contains": STRING, "minContains": 1}, "contains"),
    ({"type": "string", "pattern": "^(?!a)b$"}, "pattern"),
    ({"type": "string", "pattern": r"(a)\1"}, "pattern"),
    ({"type": "string", "pattern": "("}, "pattern"),
    ({"type": "object", "patternProperties": {"(?=a)": STRING}, "additionalProperties": False}, "patternProperties"),
    ({"type": "object", "patternProperties": {"^a": STRING, "b": {"type": "integer"}}}, "patternProperties"),
    ({"type": "object", "properties": {"a": STRING}, "required": None}, "required"),
    ({"type": "string", "enum": None}, "enum"),
    ({"type": "object", "properties": {"a": {"$id": "x", **STRING}}}, "$id"),
    (REMOTE, "$ref"),
    ({"$ref": "#/$defs/none"}, "$ref"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "items": {"$ref": "#/$defs/a"}}, "$ref"),
    ({"$dynamicRef": "#a"}, "$dynamicRef"),
    (obj({"a": STRING, "b": STRING, "c": STRING}, minProperties=2), "minProperties"),
    (obj({"a": STRING, "b": STRING, "c": STRING}, maxProperties=2), "maxProperties"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
    ({"type": "integer", "const": 2**53 + 1}, "const"),
    ({"type": "integer", "minimum": 2**53 + 1, "maximum": 2**60}, "minimum"),
    ({"type": "integer", "multipleOf": 31557600}, "multipleOf"),
    ({"type": 7}, "type"),
    ({"type": "object", "properties": ["a"]}, "properties"),
    ({"type": "object", "properties": {"a": 5}}, "5 for a schema"),
    ({"type": "string", "minLength": -1}, "minLength"),
    ({"type": "string", "maxLength": "5"}, "maxLength"),
    ({"type": "array", "items": None}, "items"),
    ({"anyOf": {"type": "string"}}, "anyOf"),
    ({"type": "object", "additionalProperties": "no"}, "additionalProperties"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties"),
]


@pytest.mark.parametrize(("schema", "keyword"), LOOSENED)
def test_a_tool_is_loosened_by_one_keyword(schema: dict[str, Any], keyword: str) -> None:
    tool = {"name": "f", "parameters": obj({"x": schema, "y": {"enum": ["kept"]}}, "x", "y")}
    grammar = tool_calls([tool, {"name": "g", "parameters": obj({"z": STRING})}])
    assert f"tool 'f': {keyword}" in grammar.loosened
    assert all(line.startswith("tool 'f': ") for line in grammar.loosened)
    assert '"kept"' in grammar.text, "the rest of the schema is kept"
    with pytest.raises(RequestError, match="tool 'f'"):
        tool_calls([{**tool, "strict": True}])


@pytest.mark.parametrize(("schema", "keyword"), LOOSENED)
def test_a_schema_is_strict_unless_it_says_otherwise(schema: dict[str, Any], keyword: str) -> None:
    with pytest.raises(RequestError):
        json_schema(schema)


def test_a_response_schema_may_be_loosened_but_not_malformed() -> None:
    grammar = json_schema(obj({"a": {"type": "array", "uniqueItems": True}}), strict=False)
    assert grammar.loosened == ("the schema: uniqueItems",)
    for schema in ({"type": 7}, {"type": "object", "properties": []}, {"required": None}, {"properties": {"a": 1}}):
        with pytest.raises(RequestError):
            json_schema(schema, strict=False)


@pytest.mark.parametrize("name", ["password", "byte", "uint32", "uri-reference", "", "regex", "int64", 7, None])
def test_an_unknown_format_is_an_annotation(name: Any) -> None:
    assert not json_schema({"type": "string", "format": name}).loosened
    assert not tool_calls([{"name": "f", "parameters": obj({"a": {"type": "string", "format": name}})}]).loosened


def test_the_end_of_a_text_may_be_written_as_in_python() -> None:
    assert plain_schema({"type": "string", "pattern": r"^a\Z"}).schema["pattern"] == "^a$"
    assert plain_schema({"type": "string", "pattern": r"^a\\Z"}).schema["pattern"] == r"^a\\Z"


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "string"},
        obj({"a": False}, "a"),
        obj({"a": {"enum": []}}, "a"),
        obj({"a": {"allOf": [{"anyOf": [obj({f"p{n}{m}": STRING}) for m in range(4)]} for n in range(6)]}}),
    ],
)
def test_arguments_that_cannot_be_compiled_become_any_object(parameters: dict[str, Any]) -> None:
    good = {"name": "good", "parameters": obj({"z": {"enum": ["kept"]}}, "z")}
    grammar = tool_calls([good, {"name": "bad", "parameters": parameters}])
    assert len(grammar.loosened) == 1 and grammar.loosened[0].startswith("tool 'bad': the whole schema (")
    assert '"kept"' in grammar.text
    with pytest.raises(RequestError, match="bad"):
        tool_calls([good, {"name": "bad", "parameters": parameters, "strict": True}])


@pytest.mark.parametrize(
    "parameters",
    [
        {"anyOf": [obj({"a": STRING}, "a"), obj({"b": STRING}, "b")]},
        {"oneOf": [obj({"a": STRING}, "a"), obj({"b": STRING}, "b")], "$schema": "x"},
        {"allOf": [obj({"a": STRING}), obj({"b": STRING})], "description": "d"},
        {
            "type": "object",
            "properties": {"a": STRING, "b": STRING},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        {"$ref": "#/$defs/P", "$defs": {"P": obj({"a": STRING, "b": STRING})}},
    ],
)
def test_alternatives_at_the_top_of_parameters_are_a_schema(parameters: dict[str, Any]) -> None:
    grammar = tool_calls([{"name": "f", "parameters": parameters}])
    assert not [line for line in grammar.loosened if "whole" in line]


def test_what_pydantic_writes_is_usable() -> None:
    pydantic = pytest.importorskip("pydantic")

    class Colour(enum.Enum):
        RED = "red"

    class Cat(pydantic.BaseModel):
        kind: Literal["cat"]

    class Dog(pydantic.BaseModel):
        kind: Literal["dog"]

    class Everything(pydantic.BaseModel):
        names: set[str]
        path: Path
        secret: pydantic.SecretStr
        raw: bytes
        counts: dict[Colour, int]
        price: decimal.Decimal
        key: uuid.UUID
        wait: timedelta
        code: Annotated[str, pydantic.Field(pattern="^[a-z]+$")]
        pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]
        big: Annotated[int, pydantic.Field(ge=-(2**63), le=2**63 - 1)]

    grammar, _ = class_answer(Everything)
    left_out = {line.removeprefix("the schema: ") for line in grammar.loosened}
    assert {"uniqueItems", "propertyNames"} <= left_out <= {"uniqueItems", "propertyNames", "pattern"}
    tool = {"name": "f", "parameters": Everything.model_json_schema()}
    assert len(tool_calls([tool]).loosened) == len(left_out)
    assert not json.loads(grammar.text)["grammars"][0]["json_schema"]["properties"]["pet"].get("oneOf")


def nested(levels: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(levels - 1)} if levels else {"type": "integer"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "description": "x" * 70_000},
        {"type": "integer", "multipleOf": 99_991, "minimum": 1},
        {"type": "string", "allOf": [{"type": "string", "pattern": f"{char}.{{14}}"} for char in "abcdef"]},
        nested(80),
    ],
)
def test_a_schema_that_is_too_complex_leaves_its_type_alone(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        json_schema(schema)
    grammar = json_schema(schema, strict=False)
    assert [line.partition(" (")[0] for line in grammar.loosened] == ["the schema: the whole schema"]
    texts = {"object": "{}", "integer": "1", "string": '"a"', "array": "[]"}
    assert [kind for kind, text in texts.items() if accepts(grammar, text)] == [schema["type"]]


@pytest.mark.parametrize(
    "schema", [{"type": "text"}, {"type": "integer", "minimum": 2, "maximum": 1}, {"enum": []}, {"const": 2**53 + 1}]
)
def test_a_schema_that_no_answer_can_obey_is_refused_in_any_case(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        json_schema(schema, strict=False)

"""Schemas of random keywords with random values: a grammar or one line of error, never another exception.

For more of them: ANY_SCHEMAS=5000 python -m pytest tests/property/test_any_schema.py
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.grammar.grammars import json_schema, tool_calls
from phi4_mlx.tools.declarations import tools_text

SCHEMAS = int(os.environ.get("ANY_SCHEMAS", "150"))
INT64 = 2**63
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 7.5, -INT64, INT64, INT64 - 1, 2**53 + 1, 10**18, 1e308, -1e308, 1e-300, "", "a",
    "^a+$", "(?=a)b", r"(a)\1", r"\Z", "date", "password", [], {}, ["a"], [1, "a", None], {"type": "string"},
    {"$ref": "#"}, {"$ref": "#/$defs/a"}, {"const": -INT64}, [{"type": "integer"}, {"type": "number"}],
    [{"$ref": "#/$defs/a"}],
    {"a": {"type": "string"}}, {"a": 5}, {"a": {"$ref": "#/properties/a"}}, ["object", "null"], "object", "integer",
    "#", "http://x", {"a": True, "b": False}, "x" * 300, "\ud800",
]  # fmt: skip
KINDS: list[Any] = ["object", "array", "string", "integer", "number", "boolean", "null", ["integer", "null"]]
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
OTHERS = [
    "type", "required", "items", "additionalProperties", "propertyNames", "uniqueItems", "not", "if", "then", "else",
    "enum", "const", "$ref", "$id", "$schema", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "multipleOf", "minLength", "maxLength", "pattern", "format", "minItems", "maxItems", "contains", "minProperties",
    "maxProperties", "dependentRequired", "default", "title", "nullable", "discriminator", "id", "$dynamicRef",
    "additionalItems", "unevaluatedProperties", "contentEncoding", "examples", "x-guidance", "strange",
]  # fmt: skip


def random_schema(dice: random.Random, depth: int = 0) -> Any:
    if depth > 4 or dice.random() < 0.1:
        return dice.choice(VALUES)
    schema: dict[str, Any] = {"type": dice.choice(KINDS)} if dice.random() < 0.6 else {}
    for _ in range(dice.randint(0, 4)):
        key = dice.choice((*BY_NAME, *LISTS, *OTHERS))
        if dice.random() < 0.45:
            schema[key] = dice.choice(VALUES)
        elif key in BY_NAME:
            names = [dice.choice(["a", "b", "^a", "x y", '"']) for _ in range(dice.randint(0, 3))]
            schema[key] = {name: random_schema(dice, depth + 1) for name in names}
        elif key in LISTS:
            schema[key] = [random_schema(dice, depth + 1) for _ in range(dice.randint(0, 3))]
        else:
            schema[key] = random_schema(dice, depth + 1)
    return schema


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SCHEMAS))
def test_any_schema_gives_a_grammar_or_one_line(seed: int) -> None:
    dice = random.Random(seed)
    schema = random_schema(dice)
    if isinstance(schema, dict) and dice.random() < 0.5:
        schema["$defs"] = {"a": random_schema(dice, 2), "b": random_schema(dice, 2)}
    tool = {"name": "f", "parameters": schema}
    within = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}, "required": ["a"]}}
    for make in (
        lambda: json_schema(schema),
        lambda: json_schema(schema, strict=False),
        lambda: tool_calls([tool, {"name": "g"}]),
        lambda: tool_calls([{**tool, "strict": True}]),
        lambda: tool_calls([within], "required"),
        lambda: tools_text([tool]),
    ):
        try:
            make()
        except RequestError as error:
            assert "\n" not in str(error) and len(str(error)) < 700

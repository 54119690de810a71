"""Random schemas of all supported keywords, answered by the demo at temperature 1: every answer is valid and ends.

For more of them: SCHEMAS=200 python -m pytest tests/property/test_constrain.py
"""

from __future__ import annotations

import json
import os
import random
import string
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from phi4_mlx.generation.sampling import make_sampler
from phi4_mlx.generation.stream import stream_generate
from phi4_mlx.grammar.constraint import Constraint
from phi4_mlx.grammar.grammars import Grammar, json_schema, tool_calls
from tests.conftest import Demo

SCHEMAS = int(os.environ.get("SCHEMAS", "40"))
MAX_TOKENS = 256
PATTERNS = ["^[A-Z][a-z]{1,8}$", "[0-9]{3}", "^(red|green|blue)(-(red|green|blue))*$", r"^\w+@\w+\.org$"]
FORMATS = ["date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "uri", "duration"]


class SchemaMaker:
    """Makes random schemas."""

    def __init__(self, seed: int):
        self.dice = random.Random(seed)
        self.definitions: dict[str, Any] = {}

    def root(self) -> dict[str, Any]:
        kind = self.dice.choice([self.object, self.object, self.object, self.array, self.any_of, self.leaf])
        schema = kind(3)
        return {**schema, "$defs": self.definitions} if self.definitions else schema

    def schema(self, depth: int) -> dict[str, Any]:
        kinds: list[Callable[[int], dict[str, Any]]] = [self.leaf] * 4
        if depth:
            kinds += [self.object, self.array, self.any_of, self.all_of, self.reference, self.map]
        return self.dice.choice(kinds)(depth - 1 if depth else 0)

    def leaf(self, _: int) -> dict[str, Any]:
        dice, low = self.dice, self.dice.randint(-50, 50)
        return dice.choice(
            [
                {"type": "string"},
                {"type": "string", "minLength": dice.randint(0, 4), "maxLength": dice.randint(4, 20)},
                {"type": "string", "pattern": dice.choice(PATTERNS)},
                {"type": "string", "format": dice.choice(FORMATS)},
                {"type": "integer"},
                {"type": "integer", "minimum": low, "exclusiveMaximum": low + dice.randint(1, 2_000)},
                {"type": "integer", "multipleOf": dice.randint(2, 12)},
                {"type": "number", "exclusiveMinimum": low, "maximum": low + 2.5},
                {"type": "number", "multipleOf": 0.5},
                {"type": "number"},
                {"type": "boolean"},
                {"type": "null"},
                {"type": ["string", "null"]},
                {"enum": [1, "two", None, {"three": [3]}, 4.5]},
                {"const": {"a": ["é", '"', 1.25]}},
                {"oneOf": [{"const": "a"}, {"const": "b", "title": "B"}, {"enum": [1, 2]}]},
                {},
            ]
        )

    def object(self, depth: int) -> dict[str, Any]:
        names = self.dice.sample(
            [*string.ascii_lowercase[:8], "ключ", "a b", 'q"', "not", "$ref"], self.dice.randint(0, 5)
        )
        properties = {name: self.schema(depth) for name in names}
        required = [name for name in names if self.dice.random() < 0.6]
        more = self.dice.choice(
            [
                {},
                {"additionalProperties": False},
                {"additionalProperties": False},
                {"additionalProperties": self.leaf(0)},
                {"patternProperties": {"^x-[a-z]+$": self.leaf(0)}, "additionalProperties": False},
            ]
        )
        return {"type": "object", "title": "T", "properties": properties, "required": required, **more}

    def map(self, depth: int) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self.schema(depth), "minProperties": 1, "maxProperties": 3}

    def array(self, depth: int) -> dict[str, Any]:
        low = self.dice.randint(0, 3)
        bounds = self.dice.choice([{}, {"minItems": low}, {"minItems": low, "maxItems": low + 2}])
        if self.dice.random() < 0.3:
            first = [self.schema(depth) for _ in range(self.dice.randint(1, 3))]
            return {
                "type": "array",
                "prefixItems": first,
                "items": self.dice.choice([False, self.leaf(0)]),
                "minItems": 1,
            }
        return {"type": "array", "items": self.schema(depth), **bounds}

    def any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth) for _ in range(self.dice.randint(2, 3))]}

    def all_of(self, depth: int) -> dict[str, Any]:
        parts = [{"type": "object", "properties": {name: self.schema(depth)}, "required": [name]} for name in "xy"]
        return {"allOf": parts}

    def reference(self, depth: int) -> dict[str, Any]:
        """A recursive schema: a linked list."""
        name = f"chain{len(self.definitions)}"
        self.definitions[name] = {}  # reserves the name, because its values may define others
        following = {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]}
        self.definitions[name] |= {
            "type": "object",
            "properties": {"value": self.schema(depth), "next": following},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        return {"$ref": f"#/$defs/{name}"}


def answer(demo: Demo, grammar: Grammar, prompt: str, seed: int) -> tuple[str, bool]:
    """The text at temperature 1, and True if it ends with an end marker."""
    model, tokenizer = demo
    constraint = Constraint(grammar, tokenizer, model.config.vocab_size, MAX_TOKENS)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    options: dict[str, Any] = {
        "max_tokens": MAX_TOKENS,
        "sampler": make_sampler(1.0, seed=seed),
        "logits_mask": constraint,
    }
    events = list(stream_generate(model, tokenizer, ids, **options))
    ended = events[-1].token in tokenizer.eos_ids
    assert events[-1].finish_reason == ("stop" if ended and not constraint.forced else "length")
    return "".join(event.text for event in events), ended


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SCHEMAS))
def test_every_answer_is_valid_under_its_schema_and_ends(demo: Demo, seed: int) -> None:
    schema = SchemaMaker(seed).root()
    text, ended = answer(demo, json_schema(schema), "Fill in the form as JSON.", seed)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
    assert ended or schema.get("type") in ("integer", "number"), text


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(max(1, SCHEMAS // 4)))
def test_every_required_tool_call_is_valid(demo: Demo, seed: int) -> None:
    tools = {}
    for n in range(3):
        maker = SchemaMaker(1_000 * (seed + 1) + n)
        parameters = {**maker.object(1), "additionalProperties": False}
        tools[f"tool_{n}"] = {**parameters, "$defs": maker.definitions}
    given = [{"type": "function", "function": {"name": name, "parameters": tool}} for name, tool in tools.items()]
    for choice in ("required", "tool_1"):
        text, ended = answer(demo, tool_calls(given, choice), "Do what is needed.", seed)
        assert ended and text.startswith("<|tool_call|>[") and text.endswith("]<|/tool_call|>"), text
        calls = json.loads(text.removeprefix("<|tool_call|>").removesuffix("<|/tool_call|>"))
        assert calls and (choice == "required" or [call["name"] for call in calls] == [choice])
        for call in calls:
            assert list(call) == ["name", "arguments"]
            jsonschema.Draft202012Validator(tools[call["name"]]).validate(call["arguments"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_an_answer_that_stops_is_the_one_without_a_limit(demo: Demo, seed: int) -> None:
    model, tokenizer = demo
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Fill in the form as JSON."}])
    short = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 8}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {**short, "additionalProperties": False}}}
    for grammar in (json_schema({"type": "integer", "maximum": 10**9}), tool_calls([tool], "f"), tool_calls([tool])):

        def said(max_tokens: int, limit: int | None, grammar: Grammar = grammar) -> tuple[str, str | None]:
            mask = Constraint(grammar, tokenizer, model.config.vocab_size, limit)
            options: dict[str, Any] = {"sampler": make_sampler(1.0, seed=seed), "logits_mask": mask}
            events = list(stream_generate(model, tokenizer, ids, max_tokens=max_tokens, **options))
            return "".join(event.text for event in events), events[-1].finish_reason

        whole = said(300, None)
        for limit in range(1, 40, 2):
            told = said(limit, limit)
            assert told[1] == "length" or told == whole, limit

"""Tools in the flat form that the model was shown in training."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.tools import flat_tool, tools_text

FUNCTION = {
    "name": "book",
    "description": "Books a room",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Größe 😀", "default": "Köln"},
            "nights": {"type": "integer"},
            "extras": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["city"],
    },
}
FLAT = {
    "name": "book",
    "description": "Books a room",
    "parameters": {
        "city": {"type": "str", "description": "Größe 😀", "default": "Köln"},
        "nights": {"type": "integer"},
        "extras": {"type": "array", "items": {"type": "string"}},
    },
}


@pytest.mark.parametrize("tool", [{"type": "function", "function": FUNCTION}, FUNCTION, FLAT])
def test_every_form_becomes_the_flat_one(tool: dict[str, Any]) -> None:
    before = copy.deepcopy(tool)
    assert flat_tool(tool) == FLAT
    assert list(flat_tool(tool)) == ["name", "description", "parameters"]
    assert tool == before


def test_what_is_left_out_stays_out() -> None:
    assert flat_tool({"name": "now"}) == {"name": "now", "parameters": {}}
    assert flat_tool({"name": "now", "description": None, "parameters": None}) == {"name": "now", "parameters": {}}
    assert flat_tool({"name": "now", "parameters": {"type": "object"}}) == {"name": "now", "parameters": {}}


def test_an_argument_called_type_is_an_argument() -> None:
    parameters = {"type": {"type": "string"}}
    assert flat_tool({"name": "x", "parameters": parameters})["parameters"] == {"type": {"type": "str"}}


def test_the_text_is_json_on_one_line_in_its_own_letters() -> None:
    text = tools_text([FUNCTION, {"name": "now", "description": "two\nlines"}])
    assert json.loads(text) == [FLAT, {"name": "now", "description": "two\nlines", "parameters": {}}]
    assert "\n" not in text and "Größe 😀" in text


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({}, "must be a list"), ("x", "must be a list"), (5, "must be a list"),
        ([5], "a tool needs a name: 5"), ([{}], "needs a name"), ([{"name": ""}], "needs a name"),
        ([{"name": 5}], "needs a name"), ([{"function": 5}], "needs a name"),
        ([{"name": "x", "parameters": 5}], "tool 'x': parameters must be an object, not 5"),
        ([{"name": "x", "parameters": {"type": "object", "properties": [5]}}], "tool 'x': parameters"),
        ([{"name": "x", "parameters": {"a": {1}}}], "tools must be JSON"),
        ([{"name": "x", "parameters": {"a": float("nan")}}], "tools must be JSON"),
        ([{"name": "x", "parameters": nested(100_000)}], "tools must be JSON"),
    ],
)  # fmt: skip
def test_malformed_tools_are_one_line(tools: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        tools_text(tools)
    assert "\n" not in str(caught.value)

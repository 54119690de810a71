"""A tool call, and the values that look like calls and are not."""

from __future__ import annotations

import dataclasses
import json

import pytest

from phi4_mlx.tools.calls import ToolCall
from tests.tool_replies import Reply, parsed


def test_a_call_in_openais_form() -> None:
    arguments = {"city": "Köln", "days": [1]}
    call = ToolCall("get_weather", arguments)
    message = call.message("call_7")
    assert message == {
        "id": "call_7", "type": "function",
        "function": {"name": "get_weather", "arguments": json.dumps(arguments, ensure_ascii=False)},
    }  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        call.name = "x"  # type: ignore[misc]


def test_a_declared_argument_that_is_an_object_may_look_like_a_schema() -> None:
    parameters = {"schema": {"type": "object", "description": "A schema"}, "n": {"type": "int"}}
    tool = {"name": "check", "parameters": parameters}
    call = {"name": "check", "arguments": {"schema": {"type": "string"}}}
    assert parsed(json.dumps(call), [tool]).calls == (ToolCall(**call),)
    assert parsed(json.dumps(call), ["check"]).calls == ()  # nothing is known of its arguments
    for echoed in (parameters, {"n": {"type": "int"}}, {"n": {"description": "A number"}}):
        text = json.dumps({"name": "check", "arguments": echoed})
        assert parsed(text, [tool]) == Reply(text, (), None)


def test_the_openai_spelling_of_a_declared_type_is_an_echo_too() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "minLength": 1}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for echoed in (parameters, *({"a": {"type": kind, "minLength": 1}} for kind in ("string", "str"))):
        text = json.dumps({"name": "f", "arguments": echoed})
        assert parsed(text, [tool]) == Reply(text, (), None)


def test_arguments_called_type_and_properties_may_be_just_that() -> None:
    tool = {"name": "mesh", "parameters": {"type": {"type": "str"}, "properties": {"type": "dict"}}}
    call = {"name": "mesh", "arguments": {"type": "object", "properties": {"a": 1}}}
    assert parsed(json.dumps(call), [tool]).calls == (ToolCall(**call),)

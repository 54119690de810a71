"""A tool call, and the conversion of the JSON that a model writes into tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.tools.declarations import flat_argument
from phi4_mlx.tools.json_text import JsonScanner, json_text

_DECODER = json.JSONDecoder(strict=False)  # a model writes line breaks in strings
_WRAPPER_KEYS = {"id", "index", "type", "function"}
_CALL_KEYS = {"id", "name", "arguments", "parameters"}
_SCHEMA_KEYS = {"type", "description", "default", "enum", "items", "format"}
# Types of arguments that cannot be objects, in the flat form and in JSON's spelling.
_NOT_OBJECTS = ("str", "int", "integer", "float", "number", "bool", "boolean", "array", "list", "null")


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for."""

    name: str
    arguments: JsonObject

    def message(self, call_id: str) -> JsonObject:
        """The call as an item of "tool_calls" in an assistant's message in OpenAI's form.

        Args:
            call_id: the id that the message with the result refers to.
        """
        function = {"name": self.name, "arguments": json_text(self.arguments)}
        return {"id": call_id, "type": "function", "function": function}


class NotACall(Exception):
    """The reason why a value is not a call; without a text if the value does not look like one."""


def parse_calls(values: Sequence[str], tools: Mapping[str, Mapping[str, Any] | None], whole: bool) -> list[ToolCall]:
    """Converts JSON values to the calls in them.

    Args:
        values: JSON texts, each a call or a list of calls.
        tools: name -> arguments in the flat form, or None if they are not known.
        whole: the values are the entire answer, which counts as a call only if it gives arguments.

    Raises:
        NotACall: a value is not a call of one of the tools.
    """
    items: list[Any] = []
    for text in values:
        value = _decoded(text)
        items += value if isinstance(value, list) else [value]
    if not items:
        raise NotACall  # an empty list
    return [_call(item, tools, whole) for item in items]


def _call(item: Any, tools: Mapping[str, Any], whole: bool) -> ToolCall:
    if isinstance(item, str):
        item = _scanned(item)
    if not isinstance(item, dict):
        raise NotACall
    function = item.get("function")
    if isinstance(function, dict) and item.get("type", "function") == "function" and item.keys() <= _WRAPPER_KEYS:
        item = function
    name = item.get("name")
    if not isinstance(name, str):
        raise NotACall
    if name not in tools:
        raise NotACall(f"{name[:100]!r} is not one of the tools: {', '.join(map(repr, tools))[:200]}")
    given = [item[key] for key in ("arguments", "parameters") if key in item]
    if not item.keys() <= _CALL_KEYS or len(given) > 1:
        raise NotACall(f"it is not a call of {name!r}: its keys are {', '.join(item)[:200]!r}")
    if whole and not given:
        raise NotACall
    arguments = given[0] if given else {}
    if isinstance(arguments, str) and arguments.strip():
        arguments = _scanned(arguments)
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        raise NotACall(f"the arguments of {name!r} are not an object")
    if _repeats(arguments, tools[name]):
        raise NotACall(f"it repeats the declaration of {name!r}")
    try:
        json_text(arguments).encode()
    except (ValueError, RecursionError):
        raise NotACall(f"the arguments of {name!r} contain half a surrogate pair or too large a number") from None
    return ToolCall(name, arguments)


def _repeats(arguments: Mapping[str, Any], declared: Mapping[str, Any] | None) -> bool:
    """True if arguments are the tool's declaration, which the model sometimes writes instead of a call."""
    known = declared or {}
    if arguments.get("type") == "object" and isinstance(arguments.get("properties"), dict):  # a JSON schema
        return not {"type", "properties"} <= known.keys()
    return bool(arguments) and all(_is_schema(value, known.get(name)) for name, value in arguments.items())


def _is_schema(value: Any, declared: Any) -> bool:
    """True if an argument is its own schema; one that may be an object must equal its declaration."""
    if not isinstance(value, dict):
        return False
    if declared is not None:
        if flat_argument(value) == declared:
            return True
        if not isinstance(declared, dict) or declared.get("type") not in _NOT_OBJECTS:
            return False
    return value.keys() <= _SCHEMA_KEYS and (isinstance(value.get("type"), str) or "description" in value)


def _scanned(text: str) -> Any:
    """The value of a string that should contain JSON."""
    text = text.strip()
    scanner = JsonScanner()
    if scanner.read(text, 0) < len(text) or not scanner.done:
        raise NotACall("a string in it should contain JSON and does not")
    return _decoded(text)


def _decoded(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        raise NotACall("it has more digits or brackets than Python can read") from None

"""Tools as the model was shown them in training: a JSON list of flat objects, in the system turn.

Source: the Phi-4-mini-instruct model card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from phi4_mlx.errors import RequestError


def flat_tool(tool: Any) -> dict[str, Any]:
    """A tool in the model's own form: {"name", "description", "parameters": {argument: {"description", "type", ...}}}.

    Args:
        tool: an OpenAI tool ({"type": "function", "function": {...}}), its function alone, or the flat form itself.

    Raises:
        RequestError: it has no name, or its parameters are no object.
    """
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f"a tool needs a name: {tool!r:.100}")
    parameters = function.get("parameters") or {}
    if isinstance(parameters, Mapping) and parameters.get("type") == "object":  # a JSON schema
        parameters = parameters.get("properties") or {}
    if not isinstance(parameters, Mapping):
        raise RequestError(f"tool {function['name']!r}: parameters must be an object, not {parameters!r:.100}")
    flat: dict[str, Any] = {"name": function["name"]}
    if function.get("description"):
        flat["description"] = function["description"]
    flat["parameters"] = {name: _flat_argument(argument) for name, argument in parameters.items()}
    return flat


def tools_text(tools: Sequence[Any]) -> str:
    """The JSON that stands between `<|tool|>` and `<|/tool|>`.

    Raises:
        RequestError: a tool is malformed, or holds what JSON cannot.
    """
    if not isinstance(tools, (list, tuple)):
        raise RequestError(f"tools must be a list, not {tools!r:.100}")
    try:
        return json_text([flat_tool(tool) for tool in tools])
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"tools must be JSON: {error}") from None


def json_text(value: Any) -> str:
    """JSON on one line, as the model reads and writes it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _flat_argument(argument: Any) -> Any:
    if isinstance(argument, Mapping) and argument.get("type") == "string":
        return {**argument, "type": "str"}
    return argument

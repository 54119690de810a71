"""Tools that can be run: functions with their declarations, and the result of a call as text for the model."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phi4_mlx.errors import Interruption, RequestError, message_of
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.declarations import check_tools, function_tool
from phi4_mlx.tools.hints import as_hinted, has_json_type
from phi4_mlx.tools.json_text import json_text

MAX_RESULT_CHARS = 16_384  # about 4,000 tokens
MAX_ERROR_CHARS = 500

Function = Callable[..., Any]
Tool = Function | tuple[Mapping[str, Any], Function]


class Toolbox:
    """Tools that can be run.

    Attributes:
        declarations: the tools in OpenAI's form.
        strict: True if calls must be generated under a grammar of the tools' schemas.
    """

    def __init__(self, tools: Sequence[Tool] = (), strict: bool = True, max_result_chars: int = MAX_RESULT_CHARS):
        """Checks the tools.

        Args:
            tools: Python functions, declared by their hints and docstrings; or (OpenAI tool, function) pairs.
            strict: as above.
            max_result_chars: the limit of a result, in characters; a longer one is cut, with a note at its end.

        Raises:
            RequestError: a tool is neither a function nor a pair, or is malformed; names it.
        """
        if not isinstance(tools, (list, tuple)):
            raise RequestError(f"tools must be a list, not {tools!r:.100}")
        pairs = [_pair(tool) for tool in tools]
        self.declarations = check_tools([declared for declared, _, _ in pairs])
        self.strict = strict
        self._max_result_chars = max_result_chars
        self._functions: dict[str, tuple[Function, Mapping[str, Any]]] = {}
        self._schemas: dict[str, Mapping[str, Any]] = {}
        for declared, (_, function, hints) in zip(self.declarations, pairs, strict=True):
            part = declared["function"]
            self._functions[part["name"]] = function, hints
            self._schemas[part["name"]] = part["parameters"]

    def __bool__(self) -> bool:
        return bool(self.declarations)

    def problem(self, call: ToolCall) -> str | None:
        """The reason why a call cannot be run, in one line; None if it can.

        Args:
            call: a call of one of the tools.
        """
        schema = self._schemas[call.name]
        properties, required = schema["properties"], schema.get("required")
        if not isinstance(properties, Mapping):  # malformed; the tool must check its arguments itself
            return None
        names = required if isinstance(required, list) else []
        if missing := [name for name in names if isinstance(name, str) and name not in call.arguments]:
            return f"{call.name} needs the argument {missing[0]!r}"
        for name, value in call.arguments.items():
            if name in properties:
                wrong = _mismatch(value, properties[name])
            else:
                wrong = "is not known" if not schema.get("additionalProperties") else None
            if wrong:
                return f"the argument {name!r:.100} of {call.name} {wrong}"
        return None

    def run(self, call: ToolCall) -> str:
        """Runs a call.

        Args:
            call: a call without a `problem`.

        Returns:
            The result as text, or an error line if the function raised an exception.

        Raises:
            KeyboardInterrupt: the person stopped it.
        """
        function, hints = self._functions[call.name]
        try:
            arguments = {name: _converted(value, hints.get(name, Any)) for name, value in call.arguments.items()}
            result = function(**arguments)
            text = str.__str__(result) if isinstance(result, str) else json_text(result)
            kept = text[: self._max_result_chars].encode("utf-8", "replace").decode()  # no halves of surrogate pairs
        except (KeyboardInterrupt, Interruption):
            raise
        except BaseException as error:  # sys.exit in a tool, for one, must not end the program
            return error_text(f"{type(error).__name__}: {message_of(error)}")
        return kept if len(kept) == len(text) else f"{kept} ... (cut after {len(kept):,} of {len(text):,})"


def error_text(text: str) -> str:
    """An error for the model: one line of at most 500 characters and a prefix."""
    return f"error: {' '.join(text.split())[:MAX_ERROR_CHARS]}".encode("utf-8", "replace").decode()


def _pair(tool: Any) -> tuple[Mapping[str, Any], Function, Mapping[str, Any]]:
    """A tool's declaration, its function, and the type hints that its arguments are converted to."""
    hints: Mapping[str, Any] = {}
    if isinstance(tool, tuple) and len(tool) == 2 and isinstance(tool[0], Mapping) and callable(tool[1]):
        declared, function = tool
    elif callable(tool):
        declared, function = function_tool(tool), tool
        hints = typing.get_type_hints(tool, include_extras=True)
    else:
        raise RequestError(f"a tool must be a function, or a pair of an OpenAI tool and a function, not {tool!r:.100}")
    if inspect.iscoroutinefunction(function):
        raise RequestError(f"the tool {tool!r:.100} is async, but no event loop runs; wrap it in asyncio.run")
    return declared, function, hints


def _mismatch(value: Any, schema: Any) -> str | None:
    """The violation of the top level of an argument's schema; the tool itself must check the levels below."""
    if not isinstance(schema, Mapping):
        return None
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(kinds, list) and not any(has_json_type(value, kind) for kind in kinds):
        return f"must be of type {' or '.join(map(str, kinds))}, not {json_text(value):.100}"
    if isinstance(schema.get("enum"), list) and value not in schema["enum"]:
        return f"must be one of {json_text(schema['enum']):.200}, not {json_text(value):.100}"
    return None


def _converted(value: Any, hint: Any) -> Any:
    """An argument as the hinted type; 2.0 becomes 2 for an int."""
    return int(value) if hint is int and isinstance(value, float) else as_hinted(hint, value)

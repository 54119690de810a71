"""Declarations of tools: from a Python function, OpenAI's form or the flat form, to OpenAI's form or the flat form.

The flat form is the model's own: in training, the system turn contained a JSON list of flat objects.

Source: the Phi-4-mini-instruct model card.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.tools.hints import JSON_TYPES, Field, NoSchema, error_line, object_schema
from phi4_mlx.tools.json_text import json_text

MAX_TOOLS_BYTES = 2**20  # of all tools of a request as JSON; a grammar of 270 KB takes 0.6 s
# Keywords whose values in a JSON schema are not themselves schemas.
_SCHEMA_WORDS = ("type", "properties", "required", "anyOf", "oneOf", "allOf", "$ref", "$schema", "title", "description")
_MAX_ALTERNATIVES = 3  # levels of alternatives in which arguments are named
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")

# Google style: the header of a section, and the first line of an argument.
_SECTION = re.compile(
    r"(args|arguments|parameters|returns?|raises|yields?|examples?|notes?|attributes|source|see also|warnings?):", re.I
)
_ARGUMENT = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")


def flat_tool(tool: Any) -> JsonObject:
    """A tool in the flat form: {"name", "description", "parameters": {argument: {"description", "type", ...}}}.

    Args:
        tool: a Python function, an OpenAI tool ({"type": "function", "function": {...}}), the "function" part of one,
            or the flat form itself.

    Raises:
        RequestError: the tool has no name, or its parameters are not an object.
    """
    function = declaration(tool)
    parameters = function.get("parameters") or {}
    if isinstance(parameters, Mapping) and _is_schema(parameters):
        parameters = _named_arguments(parameters, parameters, 0)
    if not isinstance(parameters, Mapping):
        raise RequestError(f"tool {function['name']!r}: parameters must be an object, not {parameters!r:.100}")
    flat: JsonObject = {"name": function["name"]}
    if function.get("description"):
        flat["description"] = function["description"]
    flat["parameters"] = {name: flat_argument(argument) for name, argument in parameters.items()}
    return flat


def flat_argument(schema: Any) -> Any:
    """An argument's schema in the flat form, which writes "str" for "string" and leaves other types as they are."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return {**schema, "type": "str"}
    return schema


def tools_text(tools: Sequence[Any]) -> str:
    """The JSON between `<|tool|>` and `<|/tool|>` in a prompt.

    Args:
        tools: each as for `flat_tool`.

    Raises:
        RequestError: a tool is malformed, or contains a value that is not JSON.
    """
    if not isinstance(tools, (list, tuple)):
        raise RequestError(f"tools must be a list, not {tools!r:.100}")
    try:
        return json_text([flat_tool(tool) for tool in tools])
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"tools must be JSON: {error}") from None


def declaration(tool: Any) -> Mapping[str, Any]:
    """The object with a tool's name, description and parameters.

    Args:
        tool: as for `flat_tool`.

    Raises:
        RequestError: the tool has no name, or is a function without a declaration.
    """
    if callable(tool):
        tool = function_tool(tool)
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f"a tool needs a name: {tool!r:.100}")
    return function


def check_tools(tools: Any) -> list[JsonObject]:
    """Checks tools, and returns copies in OpenAI's form.

    Args:
        tools: a list or tuple, each as for `flat_tool`. In the flat form an argument without a default is required.

    Returns:
        {"type": "function", "function": {"name", "description", "parameters": a JSON schema of an object}} for each;
        "description" and "strict" only where they are given.

    Raises:
        RequestError: the tools have more than 1 MB as JSON, two have the same name, or one is malformed or contains a
            value that is not JSON; names it.
    """
    if not isinstance(tools, (list, tuple)):
        raise RequestError(f"tools must be a list, not {tools!r:.100}")
    checked: dict[str, JsonObject] = {}
    size = 0
    for index, tool in enumerate(tools):
        try:
            function, count = _checked(tool)
        except RecursionError:
            raise RequestError(f"tool {index} is nested too deep to be JSON; make it flatter") from None
        if function["name"] in checked:
            raise RequestError(f"two tools are called {function['name']!r}; give each a name of its own")
        checked[function["name"]] = function
        size += count
        if size > MAX_TOOLS_BYTES:
            raise RequestError(
                f"the tools up to {function['name']!r}, {len(checked):,} of {len(tools):,}, have {size:,} bytes, and "
                f"the limit is {MAX_TOOLS_BYTES:,}; leave out those not needed"
            )
    return [{"type": "function", "function": function} for function in checked.values()]


def _checked(tool: Any) -> tuple[JsonObject, int]:
    """A tool's declaration with a JSON schema, and its bytes as JSON."""
    if isinstance(tool, Mapping) and tool.get("type", "function") != "function":
        raise RequestError(f"a tool has the type {tool['type']!r:.100}; the only type is 'function'")
    given = declaration(tool)
    name = given["name"]
    if not NAME.fullmatch(name):
        raise RequestError(f"tool {name!r:.150}: a name is 1 to 128 of the characters a-z, A-Z, 0-9, _, . and -")
    kept = {key: given[key] for key in ("name", "description", "parameters", "strict") if given.get(key) is not None}
    try:
        text = json_text(kept)
        size = len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(f"tool {name!r} contains half a surrogate pair, which is not text; remove it") from None
    except (TypeError, ValueError) as error:
        raise RequestError(f"tool {name!r}: it must be JSON: {error}") from None
    function: JsonObject = json.loads(text)
    for key, kind in (("description", str), ("strict", bool)):
        if not isinstance(function.get(key, kind()), kind):
            raise RequestError(f"tool {name!r}: {key} must be a {kind.__name__}, not {function[key]!r:.100}")
    function["parameters"] = _schema_of(name, function.get("parameters") or {})
    return function, size


def _schema_of(name: str, parameters: Any) -> JsonObject:
    """Parameters as a JSON schema; in the flat form they are its properties, with Python's names of types."""
    if not isinstance(parameters, dict):
        raise RequestError(f"tool {name!r}: parameters must be an object, not {parameters!r:.100}")
    if _is_schema(parameters):
        # A type that is missing or may be null is an object all the same, as arguments are.
        kinds = parameters.get("type", ["object"]) or ["object"]
        kind = "object" if isinstance(kinds, list) and "object" in kinds else kinds
        schema = {**parameters, "type": kind}
        if not schema.get("properties"):
            schema["properties"] = {}
        return schema
    for key, value in parameters.items():
        if not isinstance(value, (dict, bool)):
            raise RequestError(f"tool {name!r}: argument {key!r:.100} must be a JSON schema, not {value!r:.100}")
    required = [key for key, value in parameters.items() if isinstance(value, dict) and "default" not in value]
    return {
        "type": "object",
        "properties": {key: _unflat(value) for key, value in parameters.items()},
        "required": required,
    }


def _is_schema(parameters: Mapping[str, Any]) -> bool:
    """True for a JSON schema; in the flat form, each value is an argument's schema."""
    names = parameters.get("properties")
    if isinstance(names, Mapping) and all(isinstance(each, (Mapping, bool)) for each in names.values()):
        return True
    return any(not isinstance(parameters[key], (Mapping, bool)) for key in _SCHEMA_WORDS if key in parameters)


def _named_arguments(schema: Any, root: Mapping[str, Any], depth: int) -> JsonObject:
    """The arguments that a schema names, in its alternatives too."""
    if not isinstance(schema, Mapping) or depth > _MAX_ALTERNATIVES:
        return {}
    named = schema.get("properties")
    found = dict(named) if isinstance(named, Mapping) else {}
    if not found:
        reference = schema.get("$ref")
        parts = reference.split("/") if isinstance(reference, str) else []
        target = root.get(parts[1]) if len(parts) == 3 else None
        inner = [target.get(parts[2])] if isinstance(target, Mapping) else []
        for key in ("allOf", "anyOf", "oneOf"):
            inner += schema[key] if isinstance(schema.get(key), list) else []
        for each in inner:
            found = {**_named_arguments(each, root, depth + 1), **found}
    return found


def _unflat(argument: Any) -> Any:
    kind = argument.get("type") if isinstance(argument, dict) else None
    return {**argument, "type": JSON_TYPES.get(kind, kind)} if isinstance(kind, str) else argument


# A Python function.


def function_tool(function: Callable[..., Any]) -> JsonObject:
    """A Python function as an OpenAI tool, from its name, docstring and type hints.

    Args:
        function: its hints may be str, int, float, bool, None, Any, Literal, list, tuple, dict with str keys, Union,
            an Enum, a dataclass, a TypedDict, and Annotated[..., "description"] of any of them. The docstring's text
            up to its first section describes the tool, its Args section the arguments.

    Returns:
        {"type": "function", "function": {"name", "description", "parameters": a JSON schema of an object}}; the schema
        contains each default that is JSON.

    Raises:
        RequestError: `function` is not a function with a name, an argument cannot be passed by name, or a hint has no
            JSON schema.
    """
    name = getattr(function, "__name__", None)
    if not callable(function) or isinstance(function, type) or not isinstance(name, str):
        raise RequestError(f"a tool must be a function with a name, not {function!r:.100}")
    if not NAME.fullmatch(name):
        raise RequestError(f"{name!r:.150} cannot be the name of a tool; define it with `def` and a plain name")
    try:
        parameters = inspect.signature(function).parameters.values()
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:  # hints are code, and may fail in any way
        raise RequestError(f"tool {name!r}: its type hints cannot be read: {error_line(error)}") from None
    text, described = _docstring(function)
    fields: list[Field] = []
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise RequestError(
                f"tool {name!r}: its argument {str(parameter).partition(':')[0]!r} cannot be passed by name, as a "
                "model passes all arguments; make it an ordinary argument"
            )
        hint = hints.get(parameter.name, Any)
        fields.append(Field(parameter.name, hint, parameter.default is parameter.empty, parameter.default))
    try:
        schema = object_schema(fields, described)
    except RecursionError:
        raise RequestError(f"tool {name!r}: its type hints are nested too deep for a JSON schema") from None
    except NoSchema as error:
        raise RequestError(f"tool {name!r}: {error}") from None
    function_part = {"name": name, **({"description": text} if text else {}), "parameters": schema}
    return {"type": "function", "function": function_part}


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The description of the function, and of each argument in the Args section of its docstring."""
    text: list[str] = []
    described: dict[str, str] = {}
    section, margin, name = "", 0, ""
    for line in (inspect.getdoc(function) or "").split("\n"):
        indent = len(line) - len(line.lstrip())
        if header := _SECTION.fullmatch(line.rstrip()):
            section, margin, name = header[1].lower(), 0, ""
        elif not section:
            text.append(line)
        elif section in ("args", "arguments", "parameters") and line.strip():
            margin = margin or indent
            argument = _ARGUMENT.fullmatch(line.strip()) if indent == margin else None
            if argument:
                name, described[argument[1]] = argument[1], argument[2]
            elif name:
                described[name] = f"{described[name]} {line.strip()}".strip()
    return "\n".join(text).strip(), {name: words for name, words in described.items() if words}

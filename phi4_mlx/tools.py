"""Tools: from a Python function, an OpenAI tool or the flat form to OpenAI's form, and to what the model was shown.

In training that was a JSON list of flat objects, in the system turn.

Source: the Phi-4-mini-instruct model card.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from phi4_mlx.errors import RequestError

MAX_TOOLS = 128  # OpenAI's limit
MAX_PROPERTIES = 500  # in one tool, nested ones included; a grammar of more is slow to build
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")

_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_ARRAYS = (list, collections.abc.Sequence, collections.abc.Iterable)
_OBJECTS = (dict, collections.abc.Mapping)
# Names of types as the flat form has them.
_FLAT_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array",
               "tuple": "array", "dict": "object"}  # fmt: skip
_SECTION = re.compile(
    r"(args|arguments|parameters|returns?|raises|yields?|examples?|notes?|attributes|source|see also|warnings?):", re.I
)
_ARGUMENT = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")


def flat_tool(tool: Any) -> dict[str, Any]:
    """A tool in the model's own form: {"name", "description", "parameters": {argument: {"description", "type", ...}}}.

    Args:
        tool: a Python function, an OpenAI tool ({"type": "function", "function": {...}}), its function alone, or the
            flat form itself.

    Raises:
        RequestError: it has no name, or its parameters are no object.
    """
    function = declaration(tool)
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

    Args:
        tools: each as for `flat_tool`.

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


def declaration(tool: Any) -> Mapping[str, Any]:
    """The object that holds a tool's name, description and parameters, whatever form the tool is given in.

    Raises:
        RequestError: it has no name, or is a function that cannot be described.
    """
    if callable(tool):
        tool = function_tool(tool)
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f"a tool needs a name: {tool!r:.100}")
    return function


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Tools in OpenAI's form, each known to be one that can be served; what was given is copied, and never changed.

    Args:
        tools: a list or tuple, each as for `flat_tool`. In the flat form an argument without a default is required.

    Returns:
        {"type": "function", "function": {"name", "description", "parameters": a JSON schema of an object}} for each;
        "description" and "strict" only where they are given.

    Raises:
        RequestError: there are more than 128, two have one name, or one is malformed, too large, or holds what JSON
            cannot; says which.
    """
    if not isinstance(tools, (list, tuple)):
        raise RequestError(f"tools must be a list, not {tools!r:.100}")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"{len(tools)} tools are given; at most {MAX_TOOLS} can be: leave out those not needed")
    checked: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(tools):
        try:
            function = _checked(tool)
        except RecursionError:
            raise RequestError(f"tool {index} is nested too deep to be JSON; make it flatter") from None
        if function["name"] in checked:
            raise RequestError(f"two tools are called {function['name']!r}; give each a name of its own")
        checked[function["name"]] = function
    return [{"type": "function", "function": function} for function in checked.values()]


def _checked(tool: Any) -> dict[str, Any]:
    if isinstance(tool, Mapping) and tool.get("type", "function") != "function":
        raise RequestError(f"a tool has the type {tool['type']!r:.100}; only 'function' is known")
    given = declaration(tool)
    name = given["name"]
    if not NAME.fullmatch(name):
        raise RequestError(f"tool {name!r:.150}: a name is 1 to 128 of the characters a-z, A-Z, 0-9, _, . and -")
    kept = {key: given[key] for key in ("name", "description", "parameters", "strict") if given.get(key) is not None}
    try:
        text = json_text(kept)
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"tool {name!r}: it holds half a surrogate pair, which is no text; take that out") from None
    except (TypeError, ValueError) as error:
        raise RequestError(f"tool {name!r}: it must be JSON: {error}") from None
    function: dict[str, Any] = json.loads(text)
    for key, kind in (("description", str), ("strict", bool)):
        if not isinstance(function.get(key, kind()), kind):
            raise RequestError(f"tool {name!r}: {key} must be a {kind.__name__}, not {function[key]!r:.100}")
    function["parameters"] = _schema_of(name, function.get("parameters") or {})
    properties = sum(_property_counts(function["parameters"]))
    if properties > MAX_PROPERTIES:
        raise RequestError(
            f"tool {name!r} has {properties:,} properties; at most {MAX_PROPERTIES} can be served: split the tool"
        )
    return function


def _schema_of(name: str, parameters: Any) -> dict[str, Any]:
    """Parameters as a JSON schema; in the flat form they are the properties, under Python's names of types."""
    if not isinstance(parameters, dict):
        raise RequestError(f"tool {name!r}: parameters must be an object, not {parameters!r:.100}")
    if parameters.get("type") == "object":
        schema = {**parameters, "properties": parameters.get("properties") or {}}
    else:
        required = [key for key, value in parameters.items() if isinstance(value, dict) and "default" not in value]
        schema = {"type": "object", "properties": {key: _unflat(value) for key, value in parameters.items()}}
        schema["required"] = required
    if not isinstance(schema["properties"], dict):
        raise RequestError(f"tool {name!r}: parameters must be an object, not {schema['properties']!r:.100}")
    for key, value in schema["properties"].items():
        if not isinstance(value, (dict, bool)):
            raise RequestError(f"tool {name!r}: argument {key!r:.100} must be a JSON schema, not {value!r:.100}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise RequestError(f"tool {name!r}: required must be a list of names, not {required!r:.100}")
    return schema


def _unflat(argument: Any) -> Any:
    kind = argument.get("type") if isinstance(argument, dict) else None
    return {**argument, "type": _FLAT_TYPES.get(kind, kind)} if isinstance(kind, str) else argument


def _property_counts(schema: Any) -> Iterator[int]:
    pending = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if isinstance(value.get("properties"), dict):
                yield len(value["properties"])
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _flat_argument(argument: Any) -> Any:
    if isinstance(argument, Mapping) and argument.get("type") == "string":
        return {**argument, "type": "str"}
    return argument


# A Python function.


def function_tool(function: Callable[..., Any]) -> dict[str, Any]:
    """A Python function as an OpenAI tool: its name, docstring and type hints.

    Args:
        function: its hints may be str, int, float, bool, None, Any, Literal, list, tuple, dict with str keys, Union,
            an Enum, a dataclass, a TypedDict, and Annotated[..., "description"] of any of them. The docstring's text
            up to its first section describes the tool, its Args section the arguments.

    Returns:
        {"type": "function", "function": {"name", "description", "parameters": a JSON schema of an object}}; a default
        that JSON can hold is in the schema.

    Raises:
        RequestError: it is no function with a name, takes arguments that have none, or a hint has no JSON schema.
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
        raise RequestError(f"tool {name!r}: its type hints cannot be read: {_line(error)}") from None
    text, described = _docstring(function)
    fields: list[_Field] = []
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise RequestError(
                f"tool {name!r}: its argument {str(parameter).partition(':')[0]!r} cannot be given by name, as a model "
                "gives all; make it an ordinary argument"
            )
        hint = hints.get(parameter.name, Any)
        fields.append(_Field(parameter.name, hint, parameter.default is parameter.empty, parameter.default))
    try:
        schema = _object(fields, described, ())
    except RecursionError:
        raise RequestError(f"tool {name!r}: its type hints are nested too deep for a JSON schema") from None
    except _NoSchema as error:
        raise RequestError(f"tool {name!r}: {error}") from None
    function_part = {"name": name, **({"description": text} if text else {}), "parameters": schema}
    return {"type": "function", "function": function_part}


class _NoSchema(Exception):
    """A type hint that no JSON schema says."""


@dataclasses.dataclass(frozen=True)
class _Field:
    """An argument of a function, or a field of a class."""

    name: str
    hint: Any
    required: bool
    default: Any = inspect.Parameter.empty


def _object(fields: Sequence[_Field], described: Mapping[str, str], within: tuple[Any, ...]) -> dict[str, Any]:
    """The schema of named fields; `within` are the classes that it stands in."""
    properties = {}
    for field in fields:
        try:
            schema = _schema(field.hint, within)
        except _NoSchema as error:
            raise _NoSchema(f"{field.name!r}: {error}") from None
        if field.name in described:
            schema.setdefault("description", described[field.name])
        if field.default not in (inspect.Parameter.empty, dataclasses.MISSING):
            with contextlib.suppress(TypeError, ValueError):  # what JSON cannot hold stays the function's own affair
                schema["default"] = json.loads(json_text(_plain(field.default)).encode())
        properties[field.name] = schema
    return {
        "type": "object", "properties": properties, "required": [field.name for field in fields if field.required]
    }  # fmt: skip


def _schema(hint: Any, within: tuple[Any, ...]) -> dict[str, Any]:
    """The JSON schema of a type hint."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint is None or (isinstance(hint, type) and hint in _SCALARS):
        return {"type": _SCALARS[type(None) if hint is None else hint]}
    if origin is typing.Annotated:
        texts = [each for each in inner[1:] if isinstance(each, str)]
        return {**_schema(inner[0], within), **({"description": texts[0]} if texts else {})}
    if _qualifier(hint):
        return _schema(inner[0], within)
    if origin is typing.Literal:
        return _choice([_plain(value) for value in inner], hint)
    if origin is typing.Union or origin is types.UnionType:
        return _union([_schema(each, within) for each in inner])
    if (origin or hint) is tuple:
        return _tuple(hint, inner, within)
    if (origin or hint) in _ARRAYS:
        return {"type": "array", **({"items": _schema(inner[0], within)} if inner else {})}
    if (origin or hint) in _OBJECTS:
        if inner and inner[0] not in (str, Any):
            raise _NoSchema(f"the keys of {_shown(hint)} must be str, as they are in JSON")
        values = _schema(inner[1], within) if inner else {}
        return {"type": "object", **({"additionalProperties": values} if values else {})}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choice([member.value for member in hint], hint)
    if dataclasses.is_dataclass(hint) or hasattr(hint, "__required_keys__"):  # the latter of any module's TypedDict
        if hint in within:
            raise _NoSchema(f"{_shown(hint)} holds itself, and the schema of a tool cannot; give its text as str")
        return _object(_fields(hint), {}, (*within, hint))
    raise _NoSchema(
        f"the type {_shown(hint)} has no JSON schema; use str, int, float, bool, None, list, tuple, dict, Literal, "
        "Union, an Enum, a dataclass or a TypedDict"
    )


def _fields(kind: Any) -> list[_Field]:
    """The fields of a dataclass or a TypedDict."""
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except Exception as error:  # as in `function_tool`
        raise _NoSchema(f"the type hints of {_shown(kind)} cannot be read: {_line(error)}") from None
    if not dataclasses.is_dataclass(kind):
        needed = {"Required": True, "NotRequired": False}  # under `from __future__ import annotations` only hints say
        return [
            _Field(name, hint, needed.get(_qualifier(hint), name in kind.__required_keys__))
            for name, hint in hints.items()
        ]
    fields = []
    for field in dataclasses.fields(kind):
        if field.init:
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            fields.append(_Field(field.name, hints[field.name], required, field.default))
    return fields


def _qualifier(hint: Any) -> str:
    """What a TypedDict says of a field beside its type, by name: in Python 3.10 only typing_extensions has these."""
    name = getattr(typing.get_origin(hint), "_name", None)
    return name if name in ("Required", "NotRequired", "ReadOnly") else ""


def _tuple(hint: Any, inner: tuple[Any, ...], within: tuple[Any, ...]) -> dict[str, Any]:
    if hint in (tuple, typing.Tuple):  # noqa: UP006  (the old spelling is what is looked for)
        return {"type": "array"}
    if len(inner) == 2 and inner[1] is Ellipsis:
        return {"type": "array", "items": _schema(inner[0], within)}
    each = {"prefixItems": [_schema(one, within) for one in inner]} if inner else {}
    return {"type": "array", **each, "minItems": len(inner), "maxItems": len(inner)}


def _choice(values: list[Any], hint: Any) -> dict[str, Any]:
    """One of some values, which must be such as JSON has without brackets."""
    kinds = {_SCALARS.get(type(value)) for value in values}
    if None in kinds or not values:
        raise _NoSchema(f"the values of {_shown(hint)} must be str, int, float, bool or None")
    return {**({"type": kinds.pop()} if len(kinds) == 1 else {}), "enum": values}


def _union(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if all(list(schema) == ["type"] and isinstance(schema["type"], str) for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    return {} if {} in schemas else {"anyOf": schemas}


def _plain(value: Any) -> Any:
    """A default in JSON's own types, as far as it goes."""
    if isinstance(value, enum.Enum):
        return value.value
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """What a docstring says of the function, and of each argument in its Args section (Google style)."""
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
    return "\n".join(text).strip(), {name: said for name, said in described.items() if said}


def _shown(hint: Any) -> str:
    return str(getattr(hint, "__qualname__", "") if isinstance(hint, type) else hint)[:100] or str(hint)[:100]


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]

"""Python type hints to JSON schemas, and JSON values back to what the hints name."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import enum
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.tools.json_text import json_text

_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}

_ARRAYS = (list, collections.abc.Sequence, collections.abc.Iterable)

_OBJECTS = (dict, collections.abc.Mapping)


class NoSchema(Exception):
    """A type hint that no JSON schema says."""


@dataclasses.dataclass(frozen=True)
class Field:
    """An argument of a function, or a field of a class."""

    name: str
    hint: Any
    required: bool
    default: Any = inspect.Parameter.empty


def object_schema(fields: Sequence[Field], described: Mapping[str, str], within: tuple[Any, ...]) -> dict[str, Any]:
    """The schema of named fields; `within` are the classes that it stands in."""
    properties = {}
    for field in fields:
        try:
            schema = _schema(field.hint, within)
        except NoSchema as error:
            raise NoSchema(f"{field.name!r}: {error}") from None
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
            raise NoSchema(f"the keys of {_shown(hint)} must be str, as they are in JSON")
        values = _schema(inner[1], within) if inner else {}
        return {"type": "object", **({"additionalProperties": values} if values else {})}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choice([member.value for member in hint], hint)
    if dataclasses.is_dataclass(hint) or hasattr(hint, "__required_keys__"):  # the latter of any module's TypedDict
        if hint in within:
            raise NoSchema(f"{_shown(hint)} holds itself, and the schema of a tool cannot; give its text as str")
        return object_schema(_fields(hint), {}, (*within, hint))
    raise NoSchema(
        f"the type {_shown(hint)} has no JSON schema; use str, int, float, bool, None, list, tuple, dict, Literal, "
        "Union, an Enum, a dataclass or a TypedDict"
    )


def _fields(kind: Any) -> list[Field]:
    """The fields of a dataclass or a TypedDict."""
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except Exception as error:  # as in `function_tool`
        raise NoSchema(f"the type hints of {_shown(kind)} cannot be read: {error_line(error)}") from None
    if not dataclasses.is_dataclass(kind):
        needed = {"Required": True, "NotRequired": False}  # under `from __future__ import annotations` only hints say
        return [
            Field(name, hint, needed.get(_qualifier(hint), name in kind.__required_keys__))
            for name, hint in hints.items()
        ]
    fields = []
    for field in dataclasses.fields(kind):
        if field.init:
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            fields.append(Field(field.name, hints[field.name], required, field.default))
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
        raise NoSchema(f"the values of {_shown(hint)} must be str, int, float, bool or None")
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


def _shown(hint: Any) -> str:
    return str(getattr(hint, "__qualname__", "") if isinstance(hint, type) else hint)[:100] or str(hint)[:100]


def class_schema(kind: Any) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """The JSON schema of a class, and what makes an instance of an answer that obeys it.

    Args:
        kind: a dataclass (fields as in `phi4_mlx.tools.declarations.function_tool`), or a class with pydantic's
            `model_json_schema` and `model_validate_json`.

    Raises:
        RequestError: it is neither, or a field has a type without a schema.
    """
    if hasattr(kind, "model_json_schema") and hasattr(kind, "model_validate_json"):
        return kind.model_json_schema(), kind.model_validate_json
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        raise RequestError(f"schema must be a JSON schema, a dataclass or a pydantic model, not {kind!r:.100}")

    try:
        schema = _schema(kind, ())
    except RecursionError:
        raise RequestError(f"dataclass {kind.__qualname__}: its hints are nested too deep for a JSON schema") from None
    except NoSchema as error:
        raise RequestError(f"dataclass {kind.__qualname__}: {error}") from None
    return schema, lambda text: as_hinted(kind, json.loads(text))


def error_line(error: Exception) -> str:
    """An exception as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def as_hinted(hint: Any, value: Any) -> Any:
    """A JSON value as what a type hint says; it obeys the hint's schema already."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return as_hinted(inner[0], value)
    if origin is typing.Union or origin is types.UnionType:
        return as_hinted(next((each for each in inner if _fits(each, value)), Any), value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        hints = typing.get_type_hints(hint, include_extras=True)
        return hint(**{name: as_hinted(hints[name], each) for name, each in value.items()})
    if isinstance(value, list):
        if (origin or hint) is not tuple:
            return [as_hinted(inner[0] if inner else Any, each) for each in value]
        kinds = inner[:1] * len(value) if inner[1:] == (Ellipsis,) else inner or (Any,) * len(value)
        return tuple(map(as_hinted, kinds, value))
    if isinstance(value, dict):
        return {name: as_hinted(inner[1] if inner[1:] else Any, each) for name, each in value.items()}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    return float(value) if hint is float and isinstance(value, int) else value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a member of a union is the one that a JSON value was made for."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _fits(inner[0], value)
    if origin is typing.Literal:
        return value in inner
    kind = origin or hint
    if kind is Any:
        return True
    if dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(kind)
        needed = {each.name for each in fields if each.default is each.default_factory}  # both are MISSING
        return isinstance(value, dict) and needed <= value.keys() <= {each.name for each in fields}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return any(value == member.value for member in kind)
    if value is None or isinstance(value, (bool, str)):
        return kind in (type(value), value)
    if isinstance(value, (int, float)):
        return kind in (type(value), float)
    mapping = kind is dict or typing.is_typeddict(kind) or (isinstance(kind, type) and issubclass(kind, Mapping))
    return mapping == isinstance(value, dict)

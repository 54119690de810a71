"""Python type hints and JSON schemas: hints to schemas, and JSON values to instances of the hinted types."""

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
from typing import Any, Protocol

from phi4_mlx.errors import RequestError, message_of
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.tools.json_text import json_text

_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_ARRAYS = (list, collections.abc.Sequence, collections.abc.Iterable)
_OBJECTS = (dict, collections.abc.Mapping)
# JSON types -> the Python types of their values.
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
    "object": (dict,), "null": (type(None),),
}  # fmt: skip
# Names of Python types, as in the flat form of a tool -> JSON types.
JSON_TYPES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "tuple": "array",
    "dict": "object",
}  # fmt: skip


class NoSchema(Exception):
    """A type hint has no JSON schema; the text is the reason."""


@typing.runtime_checkable
class PydanticModel(Protocol):
    """The interface of a pydantic model's class."""

    def model_json_schema(self) -> JsonObject: ...
    def model_validate_json(self, json_data: str, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Field:
    """An argument of a function, or a field of a class."""

    name: str
    hint: Any
    required: bool
    default: Any = inspect.Parameter.empty


def object_schema(
    fields: Sequence[Field], described: Mapping[str, str] | None = None, within: tuple[Any, ...] = ()
) -> JsonObject:
    """The JSON schema of an object with named fields.

    Args:
        fields: in the order of the schema.
        described: name -> description, for fields whose hint has none.
        within: the classes that contain the object.

    Raises:
        NoSchema: a field's hint has no JSON schema; names the field.
    """
    described = described or {}
    properties = {}
    for field in fields:
        try:
            schema = _schema(field.hint, within)
        except NoSchema as error:
            raise NoSchema(f"{field.name!r}: {error}") from None
        if field.name in described:
            schema.setdefault("description", described[field.name])
        if field.default not in (inspect.Parameter.empty, dataclasses.MISSING):
            with contextlib.suppress(TypeError, ValueError):  # the schema omits a default that is not JSON
                schema["default"] = json.loads(json_text(_plain(field.default)).encode())
        properties[field.name] = schema
    return {
        "type": "object", "properties": properties, "required": [field.name for field in fields if field.required]
    }  # fmt: skip


def _schema(hint: Any, within: tuple[Any, ...]) -> JsonObject:
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
    if dataclasses.is_dataclass(hint) or hasattr(hint, "__required_keys__"):  # a TypedDict of any module
        if hint in within:
            raise NoSchema(f"{_shown(hint)} contains itself, which a tool's schema cannot; pass it as JSON in a str")
        return object_schema(_fields(hint), within=(*within, hint))
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
        # Under `from __future__ import annotations` the qualifiers are only in the hints.
        needed = {"Required": True, "NotRequired": False}
        return [
            Field(name, hint, needed.get(_qualifier(hint), name in kind.__required_keys__))
            for name, hint in hints.items()
        ]
    fields = []
    for field in dataclasses.fields(kind):
        if field.init:
            fields.append(Field(field.name, hints[field.name], _is_required(field), field.default))
    return fields


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _qualifier(hint: Any) -> str:
    """A TypedDict field's qualifier, by name, because in Python 3.10 only typing_extensions has them."""
    name = getattr(typing.get_origin(hint), "_name", None)
    return name if name in ("Required", "NotRequired", "ReadOnly") else ""


def _tuple(hint: Any, inner: tuple[Any, ...], within: tuple[Any, ...]) -> JsonObject:
    if hint in (tuple, typing.Tuple):  # noqa: UP006  (a user may write the old spelling)
        return {"type": "array"}
    if len(inner) == 2 and inner[1] is Ellipsis:
        return {"type": "array", "items": _schema(inner[0], within)}
    each = {"prefixItems": [_schema(one, within) for one in inner]} if inner else {}
    return {"type": "array", **each, "minItems": len(inner), "maxItems": len(inner)}


def _choice(values: list[Any], hint: Any) -> JsonObject:
    """The schema of one of several scalars."""
    kinds = {_SCALARS.get(type(value)) for value in values}
    if None in kinds or not values:
        raise NoSchema(f"the values of {_shown(hint)} must be str, int, float, bool or None")
    return {**({"type": kinds.pop()} if len(kinds) == 1 else {}), "enum": values}


def _union(schemas: list[JsonObject]) -> JsonObject:
    if all(list(schema) == ["type"] and isinstance(schema["type"], str) for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    return {} if {} in schemas else {"anyOf": schemas}


def _plain(value: Any) -> Any:
    """A default with an Enum member or a dataclass converted to JSON's own types."""
    if isinstance(value, enum.Enum):
        return value.value
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _shown(hint: Any) -> str:
    """A hint's name for a message, at most 100 characters."""
    return str(getattr(hint, "__qualname__", "") if isinstance(hint, type) else hint)[:100] or str(hint)[:100]


def class_schema(kind: type | PydanticModel) -> tuple[JsonObject, Callable[[str], Any]]:
    """The JSON schema of a class, and a function that makes an instance from JSON that obeys the schema.

    Args:
        kind: a dataclass (fields as in `phi4_mlx.tools.declarations.function_tool`), or a class with pydantic's
            `model_json_schema` and `model_validate_json`.

    Raises:
        RequestError: `kind` is neither, or a field's type has no JSON schema.
    """
    if isinstance(kind, PydanticModel):
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
    """An exception as one line of at most 200 characters."""
    return f"{type(error).__name__}: {message_of(error)}"[:200]


def has_json_type(value: Any, name: object) -> bool:
    """True if a JSON value has the type that a schema names; every value has an unknown type.

    Args:
        value: a parsed JSON value; 2.0 is an integer too.
        name: the schema's "type", such as "string".
    """
    if not isinstance(name, str) or name not in _PYTHON_TYPES:
        return True
    if isinstance(value, bool):
        return name == "boolean"
    if isinstance(value, float) and name == "integer":
        return value.is_integer()
    return isinstance(value, _PYTHON_TYPES[name])


def as_hinted(hint: Any, value: Any) -> Any:
    """Converts a JSON value to the hinted type: an Enum's member, a dataclass, a tuple, a float.

    Args:
        hint: the type hint.
        value: a parsed JSON value that obeys the hint's schema.
    """
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
    """True if a JSON value is meant for this member of a union."""
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
        needed = {each.name for each in fields if _is_required(each)}
        return isinstance(value, dict) and needed <= value.keys() <= {each.name for each in fields}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return any(value == member.value for member in kind)
    if value is None or isinstance(value, (bool, str)):
        return kind in (type(value), value)
    if isinstance(value, (int, float)):
        return kind in (type(value), float)
    mapping = kind is dict or typing.is_typeddict(kind) or (isinstance(kind, type) and issubclass(kind, Mapping))
    return mapping == isinstance(value, dict)

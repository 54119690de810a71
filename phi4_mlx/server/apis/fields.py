"""Typed readers for the fields of a JSON object. An error names the field, the value and the limit.

Each limit is checked where its field is read, before the value is used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.server.apis.wire import WireError
from phi4_mlx.server.limits import BRACKETS_LIMIT, DEPTH_LIMIT, NAME_CHARS_LIMIT, SHOWN_CHARS

D = TypeVar("D")


def shown(value: Any) -> str:
    """A value as an error message quotes it: short and on one line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return repr(value if len(value) <= SHOWN_CHARS else value[:SHOWN_CHARS] + "...")
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of over 30 digits"  # Python itself refuses to format one of over 4,300 digits
    if isinstance(value, (int, float)):
        return f"{value}"
    return f"a list of {len(value)}" if isinstance(value, list) else "an object"


class Ignored:
    """The parts of one body that have no effect on its answer: fields that no reader reads, and parts left out.

    The items of a list count as one object, whose fields are those of all.
    """

    def __init__(self) -> None:
        self._paths: dict[str, None] = {}
        self._given: dict[str, dict[str, None]] = {}  # the names of an object's fields, by its path
        self._read: dict[str, set[str]] = {}

    def add(self, path: str) -> None:
        """Adds the path of a part that was left out, or of a value that was replaced."""
        if len(self._paths) < _MOST_PATHS:
            self._paths[path] = None

    def track(self, path: str, values: JsonObject) -> set[str]:
        """Notes the fields of an object; returns the set for the names of those that are read."""
        path = _INDEX.sub("[]", path)
        given = self._given.setdefault(path, {})
        for name, value in values.items():
            if name not in given and len(given) < _MOST_PATHS and value not in _EMPTY:
                given[name] = None
        return self._read.setdefault(path, set())

    def paths(self) -> tuple[str, ...]:
        """The paths so far."""
        found = dict(self._paths)
        for path, given in self._given.items():
            for name in given:
                if name not in self._read[path] and name not in _LABELS:
                    name = _NOT_NAME.sub("?", name[:SHOWN_CHARS])
                    found[f"{path}.{name}" if path else name] = None
        return tuple(found)


# They have no effect on an answer anywhere; clients send them back with what they got.
_LABELS = ("id", "status", "index", "annotations", "cache_control")
_MOST_PATHS = 1_000  # more than the header has room for
_INDEX = re.compile(r"\[\d+\]")
_NOT_NAME = re.compile(r"[^A-Za-z0-9_.-]")
_EMPTY: tuple[Any, ...] = (None, False, "", [], {})


class Fields:
    """A JSON object of the body, read field by field; a null field counts as absent.

    Args:
        value: the object.
        path: its place in the body, for error messages; empty for the body itself.
        ignored: collects what is not read of the body.

    Raises:
        WireError: a value has the wrong type or is outside its limits; every method raises it.
    """

    def __init__(self, value: Any, path: str = "", ignored: Ignored | None = None) -> None:
        self.path = path
        if not isinstance(value, dict):
            raise WireError(400, f"{path or 'the body'} must be a JSON object, not {shown(value)}", path or None)
        self.values: JsonObject = value
        self.ignored = Ignored() if ignored is None else ignored
        self._read = self.ignored.track(path, value)

    def ignore(self, name: str | None = None) -> None:
        """Notes that this object, or one of its fields, is left out."""
        self._read.update(self.values if name is None else [name])
        self.ignored.add(self.path if name is None else self.where(name))

    def where(self, name: str) -> str:
        """The path of a field in the body."""
        return f"{self.path}.{name}" if self.path else name

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raises the error that states what is wrong with a field."""
        raise WireError(400, f"{self.where(name)} {why}", self.where(name))

    def get(self, name: str) -> Any:
        """A field's value as it is, of any type."""
        self._read.add(name)
        return self.values.get(name)

    def has(self, name: str) -> bool:
        """True if the field is present and not null."""
        return self.get(name) is not None

    def need(self, *names: str) -> None:
        """Refuses an object in which one of these fields is absent."""
        for name in names:
            if not self.has(name):
                self.refuse(name, "is missing")

    def forbid(self, why: str, *names: str) -> None:
        """Refuses an object that uses one of these fields; false and empty values are accepted."""
        for name in names:
            if self.get(name) not in _EMPTY:
                self.refuse(name, f"is not supported here: {why}")

    def text(self, name: str, default: D, least: int = 0, most: int | None = None) -> str | D:
        """A string of `least` to `most` characters."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self.refuse(name, f"must be text, not {shown(value)}")
        if len(value) < least:
            self.refuse(name, "must not be empty")
        if most is not None and len(value) > most:
            self.refuse(name, f"must be at most {most:,} characters, not {len(value):,}")
        return value

    def needed_text(self, name: str, least: int = 0, most: int | None = None) -> str:
        """A string that must be present."""
        self.need(name)
        return self.text(name, "", least, most)

    def needed_name(self, name: str) -> str:
        """The name or id of something: present and not empty."""
        return self.needed_text(name, 1, NAME_CHARS_LIMIT)

    def texts(self, name: str, most: int, most_chars: int, least: int = 0) -> tuple[str, ...]:
        """A list of `least` to `most` strings of 1 to `most_chars` characters; empty if absent."""
        values = self.items(name, most, least)
        for each in values:
            if not isinstance(each, str) or not 1 <= len(each) <= most_chars:
                self.refuse(name, f"must be strings of 1 to {most_chars:,} characters, not {shown(each)}")
        return tuple(values)

    def number(self, name: str, default: D, low: float, high: float) -> float | D:
        """A number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            self.refuse(name, f"must be a number from {low:g} to {high:g}, not {shown(value)}")
        return float(value)

    def integer(self, name: str, default: D, low: int, high: int) -> int | D:
        """A whole number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():  # languages with one kind of number may write 8.0
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            self.refuse(name, f"must be a whole number from {low:,} to {high:,}, not {shown(value)}")
        return int(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, f"must be true or false, not {shown(value)}")
        return value

    def items(self, name: str, most: int, least: int = 0) -> list[Any]:
        """A list of `least` to `most` values; empty if absent."""
        value = [] if self.get(name) is None else self.get(name)
        if not isinstance(value, list):
            self.refuse(name, f"must be a list, not {shown(value)}")
        if not least <= len(value) <= most:
            self.refuse(name, f"must have {least:,} to {most:,} values, not {len(value):,}")
        return value

    def child(self, name: str) -> Fields:
        """An object; an empty one if absent."""
        return Fields(self.get(name) if self.has(name) else {}, self.where(name), self.ignored)

    def children(self, name: str, most: int, least: int = 0) -> list[Fields]:
        """A list of `least` to `most` objects; empty if absent."""
        return [
            Fields(each, f"{self.where(name)}[{i}]", self.ignored)
            for i, each in enumerate(self.items(name, most, least))
        ]

    def one_of(self, name: str, known: Sequence[str], default: str | None = None) -> str:
        """One of the words in `known`."""
        value = default if self.get(name) is None else self.get(name)
        if value not in known:
            self.refuse(name, f"must be one of {', '.join(known)}, not {shown(value)}")
        return str(value)


def parse_json(data: bytes) -> Any:
    """Parses a body as JSON.

    Raises:
        WireError: it is not JSON, or has too many brackets.
    """

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    if (brackets := data.count(b"[") + data.count(b"{")) > BRACKETS_LIMIT:
        raise WireError(400, f"the body contains {brackets:,} opening brackets; the limit is {BRACKETS_LIMIT:,}")
    try:
        return json.loads(data, parse_constant=refuse_constant)
    except RecursionError:
        raise WireError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise WireError(400, f"the body is not JSON: {error!s:.200}") from None


def read_body(body: Any) -> Fields:
    """The fields of a whole body, after `check_json`.

    Raises:
        WireError: the body fails `check_json`, or is not an object.
    """
    check_json(body, "the body")
    return Fields(body)


def check_json(value: Any, name: str) -> None:
    """Checks the strings, numbers and depth of parsed JSON.

    Raises:
        WireError: it contains an unpaired surrogate, NaN or infinity, or nests deeper than `DEPTH_LIMIT`; the message
            calls it `name`.
    """
    layer, depth = [value], 0
    while layer:
        if depth > DEPTH_LIMIT:
            raise WireError(400, f"{name} nests deeper than {DEPTH_LIMIT} levels")
        below: list[Any] = []
        for each in layer:
            if isinstance(each, dict):
                below.extend(each)
                below.extend(each.values())
            elif isinstance(each, list):
                below.extend(each)
            elif isinstance(each, str):
                try:
                    each.encode()
                except UnicodeEncodeError:
                    raise WireError(400, f"{name} contains an unpaired surrogate: {shown(each)}") from None
            elif isinstance(each, float) and not math.isfinite(each):
                raise WireError(400, f"{name} contains {each}, which JSON does not allow")
        layer, depth = below, depth + 1

"""Declarations of tools: the flat form of the model's training, OpenAI's form, and Python functions."""

from __future__ import annotations

import copy
import enum
import functools
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict, TypeVar

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.tools.declarations import check_tools, flat_tool, function_tool, tools_text

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
def test_every_form_becomes_the_flat_form(tool: dict[str, Any]) -> None:
    before = copy.deepcopy(tool)
    assert flat_tool(tool) == FLAT
    assert list(flat_tool(tool)) == ["name", "description", "parameters"]
    assert tool == before


def test_missing_fields_stay_missing() -> None:
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
        ([{"name": "x", "parameters": {"a": {1}}}], "tools must be JSON"),
        ([{"name": "x", "parameters": {"a": float("nan")}}], "tools must be JSON"),
        ([{"name": "x", "parameters": nested(100_000)}], "tools must be JSON"),
    ],
)  # fmt: skip
def test_malformed_tools_are_one_line(tools: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        tools_text(tools)
    assert "\n" not in str(caught.value)


# Python functions.


class Unit(enum.Enum):
    CELSIUS = "c"
    KELVIN = "k"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclass
class Place:
    city: str
    zip_code: int | None = None
    tags: list[str] = field(default_factory=list)
    made: str = field(init=False, default="x")


class Base(TypedDict):
    name: str


class Person(Base, total=False):
    age: int


class Some(TypedDict, total=False):
    a: typing.Required[int]
    b: typing.NotRequired[str]
    c: bool


class Most(TypedDict):
    a: typing.Required[int]
    b: typing.NotRequired[str]
    c: bool


@dataclass
class Tree:
    children: list[Tree]


def get_weather(city: str, days: int = 3, unit: Unit = Unit.CELSIUS) -> str:
    """Gives the weather.

    Over several lines,
    as it is.

    Args:
        city: the city,
            exactly: by its own name, "Köln".
        days (int, optional): how many days

    Returns:
        city: a text that is not an argument.
    """
    return city + str(days) + str(unit)


def test_a_function_is_its_name_docstring_and_hints() -> None:
    assert function_tool(get_weather) == {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Gives the weather.\n\nOver several lines,\nas it is.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": 'the city, exactly: by its own name, "Köln".'},
                    "days": {"type": "integer", "description": "how many days", "default": 3},
                    "unit": {"type": "string", "enum": ["c", "k"], "default": "c"},
                },
                "required": ["city"],
            },
        },
    }


def test_a_function_without_docstring_and_hints() -> None:
    def now(a, b=5):  # type: ignore[no-untyped-def]
        return a

    parameters = {"type": "object", "properties": {"a": {}, "b": {"default": 5}}, "required": ["a"]}
    assert function_tool(now) == {"type": "function", "function": {"name": "now", "parameters": parameters}}


PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string"}, "zip_code": {"type": ["integer", "null"], "default": None},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city"],
}  # fmt: skip
PERSON = {
    "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name"]
}  # fmt: skip
STRINGS = {"type": "array", "items": {"type": "string"}}


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}), (int, {"type": "integer"}), (float, {"type": "number"}), (bool, {"type": "boolean"}),
        (None, {"type": "null"}), (Any, {}), (list, {"type": "array"}), (dict, {"type": "object"}),
        (list[str], STRINGS), (typing.List[str], STRINGS),  # noqa: UP006
        (Sequence[str], STRINGS), (list[Any], {"type": "array", "items": {}}),
        (list[list[int]], {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
        (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
        (Mapping[str, bool], {"type": "object", "additionalProperties": {"type": "boolean"}}),
        (typing.Dict[str, Any], {"type": "object"}), (typing.Dict, {"type": "object"}),  # noqa: UP006
        (tuple, {"type": "array"}), (typing.Tuple, {"type": "array"}), (typing.List, {"type": "array"}),  # noqa: UP006
        (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
        (tuple[()], {"type": "array", "minItems": 0, "maxItems": 0}),
        (
            tuple[int, str],
            {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 2, "maxItems": 2},
        ),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}), (Literal[1, "b", None], {"enum": [1, "b", None]}),
        (Literal[Unit.KELVIN], {"type": "string", "enum": ["k"]}),
        (typing.Optional[str], {"type": ["string", "null"]}),  # noqa: UP045
        (typing.Union[int, str], {"type": ["integer", "string"]}), (typing.Union[int, Any], {}),  # noqa: UP007
        (int | None, {"type": ["integer", "null"]}),
        (list[str] | None, {"anyOf": [STRINGS, {"type": "null"}]}),
        (Unit, {"type": "string", "enum": ["c", "k"]}), (Level, {"type": "integer", "enum": [1, 2]}),
        (Place, PLACE), (list[Place], {"type": "array", "items": PLACE}), (Person, PERSON),
        (Annotated[int, 5, "how many"], {"type": "integer", "description": "how many"}),
        (Annotated[int, 5], {"type": "integer"}),
        (list[Annotated[str, "a word"]], {"type": "array", "items": {"type": "string", "description": "a word"}}),
    ],
)  # fmt: skip
def test_every_hint_has_its_schema(hint: Any, schema: dict[str, Any]) -> None:
    def tool(x):  # type: ignore[no-untyped-def]
        """Docstring."""

    tool.__annotations__["x"] = hint
    parameters = function_tool(tool)["function"]["parameters"]
    assert parameters == {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    assert check_tools([tool])[0]["function"]["parameters"] == parameters


def test_annotated_overrides_the_docstring() -> None:
    def tool(x: Annotated[int, "by the hint"], y: Annotated[int, 5]) -> None:
        """T.

        Args:
            x: by the docstring
            y: by the docstring
        """

    properties = function_tool(tool)["function"]["parameters"]["properties"]
    assert [properties[name]["description"] for name in "xy"] == ["by the hint", "by the docstring"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Required and NotRequired came with Python 3.11")
def test_a_typed_dict_has_its_required_fields_in_its_hints() -> None:
    """With postponed annotations, as here, the class's own `__required_keys__` are wrong."""

    def tool(some: Some, most: Most) -> None:
        """T."""

    properties = function_tool(tool)["function"]["parameters"]["properties"]
    kinds = {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": "boolean"}}
    assert properties["some"]["properties"] == properties["most"]["properties"] == kinds
    assert properties["some"]["required"] == ["a"] and properties["most"]["required"] == ["a", "c"]


def test_a_default_that_is_not_json_makes_an_argument_optional() -> None:
    koeln, nan = Place("Köln"), float("nan")

    def tool(a: Any = print, b: float = nan, c: Place = koeln, d: Any = (1, 2), e: str = "\ud800") -> None:
        """T."""

    parameters = function_tool(tool)["function"]["parameters"]
    assert parameters["required"] == []
    defaults = {name: schema["default"] for name, schema in parameters["properties"].items() if "default" in schema}
    place = {"city": "Köln", "zip_code": None, "tags": [], "made": "x"}
    assert defaults == {"c": place, "d": [1, 2]}


def test_methods_and_wrapped_functions_are_functions() -> None:
    class Desk:
        def book(self, room: int) -> None:
            """Books."""

        @staticmethod
        def free(room: int) -> None:
            """Frees."""

    @functools.wraps(get_weather)
    def wrapped(*args: Any, **kwargs: Any) -> Any: ...

    for method in (Desk().book, Desk.free):
        assert list(function_tool(method)["function"]["parameters"]["properties"]) == ["room"]
    assert function_tool(wrapped) == function_tool(get_weather)


def star(*rooms: int) -> None: ...
def stars(**rooms: int) -> None: ...
def positional(a: int, /) -> None: ...
def unresolved(a: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def keys(a: dict[int, str]) -> None: ...
def no_schema(a: set[str]) -> None: ...
def within(a: list[complex]) -> None: ...
def variable(a: TypeVar("T")) -> None: ...  # type: ignore[valid-type]
def in_bytes(a: Literal[b"x"]) -> None: ...
def itself(a: Tree) -> None: ...


def in_class(a: Broken) -> None: ...


@dataclass
class Broken:
    x: Nowhere  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (star, r"tool 'star': its argument '\*rooms' cannot be passed by name"),
        (stars, r"tool 'stars': its argument '\*\*rooms' cannot be passed by name"),
        (positional, "tool 'positional': its argument 'a' cannot be passed by name"),
        (unresolved, "tool 'unresolved': its type hints cannot be read: NameError: name 'Nowhere' is not defined"),
        (keys, r"tool 'keys': 'a': the keys of dict\[int, str\] must be str"),
        (no_schema, r"tool 'no_schema': 'a': the type set\[str\] has no JSON schema; use str, int"),
        (within, "tool 'within': 'a': the type complex has no JSON schema"),
        (in_bytes, r"tool 'in_bytes': 'a': the values of typing.Literal\[b'x'\] must be str"),
        (itself, "tool 'itself': 'a': 'children': Tree contains itself"),
        (in_class, "tool 'in_class': 'a': the type hints of Broken cannot be read: NameError"),
        (lambda x: x, "'<lambda>' cannot be the name of a tool; define it with `def`"),
        (functools.partial(star), "a tool must be a function with a name, not functools.partial"),
        (Place, "a tool must be a function with a name, not <class"),
        (5, "a tool must be a function with a name, not 5"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_one_line(function: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        function_tool(function)
    assert "\n" not in str(caught.value)


def test_functions_are_accepted_as_tools_everywhere() -> None:
    flat = flat_tool(get_weather)
    assert flat["parameters"]["city"] == {"type": "str", "description": 'the city, exactly: by its own name, "Köln".'}
    assert json.loads(tools_text([get_weather, FUNCTION])) == [flat, FLAT]


# check_tools: OpenAI's form.


@pytest.mark.parametrize(
    "tool", [{"type": "function", "function": FUNCTION}, FUNCTION, FUNCTION | {"type": "function"}]
)
def test_a_schema_is_copied_unchanged(tool: dict[str, Any]) -> None:
    before = copy.deepcopy(tool)
    checked = check_tools([tool])
    assert checked == [{"type": "function", "function": FUNCTION}]
    checked[0]["function"]["parameters"]["properties"].clear()
    assert tool == before


def test_the_flat_form_becomes_a_schema() -> None:
    arguments = {"a": {"type": "str"}, "b": {"type": "list", "default": []}, "c": {"enum": [1]}}
    flat = {"name": "f", "parameters": arguments}
    properties = {"a": {"type": "string"}, "b": {"type": "array", "default": []}, "c": {"enum": [1]}}
    schema = {"type": "object", "properties": properties, "required": ["a", "c"]}
    assert check_tools((flat,)) == [{"type": "function", "function": {"name": "f", "parameters": schema}}]


def test_a_checked_tool_has_only_known_fields() -> None:
    empty = {"type": "object", "properties": {}}
    assert check_tools([]) == []
    assert check_tools([{"name": "f", "description": None, "parameters": {"type": "object"}, "other": 5}]) == [
        {"type": "function", "function": {"name": "f", "parameters": empty}}
    ]
    strict = check_tools([{"name": "f", "strict": True, "description": ""}])[0]["function"]
    assert strict["strict"] is True and strict["description"] == ""


def test_the_prompt_names_the_arguments_of_alternatives() -> None:
    first, second = {"type": "object", "properties": {"a": {"type": "string"}}}, {"properties": {"b": {}}}
    for parameters in (
        {"anyOf": [first, second]},
        {"type": "object", "allOf": [{"oneOf": [first, second]}]},
        {"$ref": "#/$defs/P", "$defs": {"P": {"anyOf": [first, second]}}},
    ):
        (checked,) = check_tools([{"name": "f", "parameters": parameters}])
        assert checked["function"]["parameters"] == {**parameters, "type": "object", "properties": {}}
        assert flat_tool(checked)["parameters"].keys() == {"a", "b"}
    for endless in ({"$ref": "#"}, {"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}}):
        assert flat_tool({"name": "f", "parameters": endless})["parameters"] == {}


def wide(count: int, depth: int = 0) -> dict[str, Any]:
    schema = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(count)}}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"in": {"anyOf": [schema]}}}
    return {"name": "wide", "parameters": schema}


def test_tools_at_the_limits_are_accepted() -> None:
    assert len(check_tools([{**wide(20), "name": f"t{n}"} for n in range(1_000)])) == 1_000
    check_tools([wide(2_000, depth=2)])
    check_tools([{"name": "a.b-C_9" + "x" * 121}])


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({}, "must be a list"), ("x", "must be a list"), (None, "must be a list"),
        ([5], "a tool needs a name: 5"), ([{}], "needs a name"), ([{"function": {}}], "needs a name"),
        ([{"type": "web_search", "name": "x"}], "type 'web_search'; the only type is 'function'"),
        ([{"name": "two words"}], "tool 'two words': a name is 1 to 128"), ([{"name": "x" * 129}], "a name is 1 to"),
        ([{"name": "x\n"}], r"tool 'x\\n': a name"), ([{"name": "größe"}], "a name is"),
        ([{"name": "x"}, get_weather, {"name": "x"}], "two tools are called 'x'"),
        ([{**wide(20), "name": f"t{n}"} for n in range(3_000)], r"the tools up to 't1\d+', .* of 3,000, .*1,048,\d+"),
        ([{"name": "x", "parameters": {"a": {"default": {1}}}}], "tool 'x': it must be JSON: .*set"),
        ([{"name": "x", "parameters": {"a": {"default": float("nan")}}}], "tool 'x': it must be JSON"),
        ([{"name": "x", "description": "\ud800"}], "tool 'x' contains half a surrogate pair"),
        ([{"name": "x", "parameters": nested(100_000)}], "tool 0 is nested too deep"),
        ([nested(100_000)], "a tool needs a name|tool 0 is nested too deep"),
        ([{"name": "x", "description": 5}], "tool 'x': description must be a str, not 5"),
        ([{"name": "x", "strict": "yes"}], "tool 'x': strict must be a bool, not 'yes'"),
        ([{"name": "x", "parameters": [5]}], r"tool 'x': parameters must be an object, not \[5\]"),
        ([{"name": "x", "parameters": {"a": 5}}], "tool 'x': argument 'a' must be a JSON schema, not 5"),
        ([star], "tool 'star'"),
    ],
)  # fmt: skip
def test_malformed_and_too_large_tools_are_one_line(tools: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        check_tools(tools)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400

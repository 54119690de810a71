"""Whole numbers of any size, and floats: a grammar keeps them exactly, refuses them, or says that it loosened them."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4_mlx.errors import RequestError
from phi4_mlx.grammar.grammars import json_schema, tool_calls
from phi4_mlx.tools.parser import ToolCallParser
from tests.json_schemas import accepts, obj

INT64 = 2**63


@pytest.mark.parametrize("value", [-INT64, INT64, 2**53 + 1, -(2**53) - 1, 2**64, 10**21, 9223372036854775807])
@pytest.mark.parametrize("keyword", ["const", "enum", "both"])
def test_a_whole_number_that_would_change_is_refused(value: int, keyword: str) -> None:
    schema: dict[str, Any] = {
        "const": {"const": value}, "enum": {"enum": [1, value]}, "both": {"minimum": value, "maximum": value},
    }[keyword]  # fmt: skip
    with pytest.raises(RequestError, match=r"cannot be kept exactly|greater than|contains no integer|combinations"):
        json_schema(obj({"a": {"type": "integer", **schema}}))
    tool = {"name": "f", "parameters": obj({"a": {"type": "integer", **schema}}, "a")}
    assert tool_calls([tool]).loosened
    with pytest.raises(RequestError, match="tool 'f': "):
        tool_calls([{**tool, "strict": True}])


@pytest.mark.parametrize(
    "value", [0, -1, 2**53, -(2**53), 2**62, -(2**62), 0.1, 1e-7, 2.5e-3, -0.25, [2**53], {"a": 3}]
)
def test_a_constant_keeps_its_value(value: Any) -> None:
    text = json_text(value)
    assert accepts(json_schema({"const": value}), text)
    assert accepts(json_schema({"enum": [value, "other"]}), text)


def json_text(value: Any) -> str:
    """JSON with floats in digits, as the grammar writes them."""
    return format(Decimal(repr(value)), "f") if isinstance(value, float) else json.dumps(value)


def test_a_large_float_keeps_its_value() -> None:
    assert accepts(json_schema({"const": 1e21}), str(10**21))
    with pytest.raises(RequestError, match="cannot be kept exactly"):
        json_schema({"allOf": [{"const": 1e21}, {"type": "integer"}]})


@pytest.mark.parametrize(
    ("low", "high"),
    [(-INT64, INT64 - 1), (-(2**31), 2**31 - 1), (0, 2**64 - 1), (0, 2**32 - 1), (-1e308, 1e308), (0, INT64 - 1)],
)
@pytest.mark.parametrize("kind", ["integer", "number"])
def test_everyday_bounds_are_kept(low: Any, high: Any, kind: str) -> None:
    grammar = json_schema({"type": kind, "minimum": low, "maximum": high})
    for value in (low, high, 0, 1, low + 1, high - 1):
        if isinstance(value, int):
            assert accepts(grammar, str(value)), value
    if abs(low) < 2**53:
        assert not accepts(grammar, str(low - 1))
    if abs(high) < 2**53 or (kind, high) == ("integer", INT64 - 1):
        assert not accepts(grammar, str(high + 1))


whole = st.one_of(
    st.integers(-(2**65), 2**65),
    st.integers(-100, 100),
    st.sampled_from(
        [sign * (base + away) for base in (2**53, 2**63, 10**18) for away in (-1, 0, 1) for sign in (1, -1)]
    ),
)


@settings(deadline=None, max_examples=200)
@given(low=st.none() | whole, high=st.none() | whole, near=st.integers(-2, 2), exclusive=st.booleans())
def test_integer_bounds_agree_with_python(low: int | None, high: int | None, near: int, exclusive: bool) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    away = int(exclusive)
    if low is not None:
        schema["exclusiveMinimum" if exclusive else "minimum"] = low - away
    if high is not None:
        schema["exclusiveMaximum" if exclusive else "maximum"] = high + away
    try:
        grammar = json_schema(schema)
    except RequestError:
        far = [each for each in (low, high) if each is not None and abs(each) > 2**53]
        assert far or (low is not None and high is not None and low > high)
        return
    for value in [each + near for each in (low, high) if each is not None] + [near]:
        inside = (low is None or low <= value) and (high is None or value <= high)
        if abs(value) < INT64:
            assert accepts(grammar, str(value)) == inside
        elif inside:
            assert accepts(grammar, str(value))


@pytest.mark.parametrize("value", [0.1, 0.3, 1.1, 1e-7, 0.01, 5, 1000, 2.5])
def test_multiples_are_exact(value: float) -> None:
    grammar = json_schema({"type": "number", "multipleOf": value})
    for count in (1, 2, 3, 7):
        assert accepts(grammar, str(round(count * value, 9)) if value >= 1e-3 else f"{count * value:.7f}")


def test_a_product_of_multiples_is_refused_before_it_is_compiled() -> None:
    steps = [{"type": "integer", "multipleOf": n} for n in (97, 89, 83, 79)]
    nested = {
        "$defs": {"a": steps[0], "b": steps[1]},
        "allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}, *steps[2:]],
    }
    for schema in (
        {"allOf": steps},
        {"allOf": [{"allOf": steps[:2]}, {"allOf": steps[2:]}]},
        {"allOf": [{"anyOf": [each]} for each in steps]},
        {**steps[0], "allOf": steps[1:]},
        nested,
        {"allOf": [{"properties": {"a": each}} for each in steps]},
        {"allOf": [{"type": "number", "multipleOf": n / 10} for n in (97, 89, 73, 79)]},
        {"type": "integer", "multipleOf": 31557600},
        {"$defs": {"a": steps[0]}, "$ref": "#/$defs/a", "multipleOf": 8900},
        {"allOf": [{"type": "array", "items": each} for each in steps]},
        {"type": "object", "patternProperties": {"^a": steps[0]}, "properties": {"ab": {"multipleOf": 8311}}},
        {"type": "integer", "multipleOf": 9973, "minimum": 0, "maximum": 10**15},
        {"type": "integer", "multipleOf": 3_600_000, "minimum": 0, "maximum": 10**15},
        {"type": "integer", "multipleOf": 2**20, "minimum": 0, "maximum": 10**15},
        {"anyOf": [{"type": "integer", "multipleOf": 9973 + 2 * n} for n in range(10)]},
    ):
        with pytest.raises(RequestError, match=r"'multipleOf' values take .* states, and the limit is 100,000"):
            json_schema(schema)
    json_schema(obj({str(n): {"type": "integer", "multipleOf": n} for n in (97, 89, 83, 79)}))


@pytest.mark.parametrize(
    ("step", "bounds", "right", "wrong"),
    [
        (4096, {"minimum": 4096, "maximum": 409_600}, (4096, 8192, 409_600), (0, 4097, 413_696, -4096)),
        (86_400, {"minimum": 86_400, "maximum": 8_640_000}, (86_400, 8_640_000), (0, 86_401, 8_726_400)),
        (86_400, {"minimum": 1}, (86_400, 172_800), (0, 86_401, -86_400)),
        (86_400, {"maximum": -1}, (-86_400,), (0, 86_400)),
        (8633, {"minimum": 1}, (8633, 8633 * 8633), (0, 8634)),
        (8633, {}, (0, 8633, -8633), (1,)),
        (19_997, {"minimum": 1, "maximum": 10**6}, (19_997, 999_850), (0, 10**6)),
        (10**6, {"minimum": 1}, (10**6,), (0, 10**5)),
        (997, {"exclusiveMinimum": 997, "exclusiveMaximum": 10**9}, (1994, 997_000), (997, 1995)),
        (1.5, {"minimum": 3, "maximum": 9}, (3, 6, 9), (4, 5, 12)),
    ],
)
def test_multiples_within_bounds_have_an_answer(
    step: float, bounds: dict[str, int], right: tuple[int, ...], wrong: tuple[int, ...]
) -> None:
    schema = {"type": "integer", "multipleOf": step, **bounds}
    grammar, within = json_schema(schema), json_schema(obj({"a": schema}, "a"))
    assert all(accepts(grammar, str(n)) and accepts(within, f'{{"a": {n}}}') for n in right)
    assert not any(accepts(grammar, str(n)) or accepts(within, f'{{"a": {n}}}') for n in wrong)


def test_multiples_in_an_intersection_have_an_answer() -> None:
    steps = [{"type": "integer", "multipleOf": n} for n in (97, 89)]
    for schema in ({"allOf": steps, "minimum": 1}, {"allOf": [*steps, {"type": "integer", "minimum": 1}]}):
        grammar = json_schema(schema)
        assert accepts(grammar, str(97 * 89)) and not accepts(grammar, "97") and not accepts(grammar, "0")


def test_bounds_without_a_multiple_are_refused() -> None:
    for bounds in ({"minimum": 1, "maximum": 6}, {"exclusiveMinimum": 0, "exclusiveMaximum": 7}):
        with pytest.raises(RequestError, match="does not contain a multiple"):
            json_schema({"type": "integer", "multipleOf": 7, **bounds}, strict=False)


@pytest.mark.parametrize("value", [2**53 + 1, 10**40, -(2**63), 12345678901234567890])
def test_a_call_passes_whole_numbers_on_exactly(value: int) -> None:
    parser = ToolCallParser(["f"])
    parser.add(f'<|tool_call|>[{{"name": "f", "arguments": {{"a": {value}}}}}]<|/tool_call|>')
    parser.finish()
    assert parser.calls[0].arguments == {"a": value}
    assert str(value) in parser.calls[0].message("1")["function"]["arguments"]


def test_multiples_of_many_tools_are_bounded_together() -> None:
    parameters = obj({"a": {"type": "integer", "multipleOf": 9973}}, "a")
    tools = [{"name": f"t{n}", "parameters": parameters} for n in range(40)]
    grammar = tool_calls(tools)
    assert len(grammar.loosened) == 30 and all("the whole schema ('multipleOf'" in line for line in grammar.loosened)
    with pytest.raises(RequestError, match="tool 't10': 'multipleOf' of all tools takes over 100,000 states"):
        tool_calls([{**tool, "strict": True} for tool in tools])


def test_a_bound_beyond_64_bits_is_left_out_and_reported() -> None:
    for bound in ({"maximum": 2**63}, {"maximum": 2**64 - 1}, {"minimum": -(2**63) - 1}, {"exclusiveMaximum": 2**80}):
        (key,) = bound
        assert json_schema({"type": "integer", **bound}).loosened == (f"the schema: {key}",)
    assert json_schema({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}).loosened == ()

"""The readers of fields: the values that each accepts, and the error for every other value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from phi4_mlx.server.apis.body import (
    check_tool_choice,
    read_max_tokens,
    read_model,
    read_response_format,
    read_sampling,
    read_schema,
    read_stop,
    read_tool,
)
from phi4_mlx.server.apis.content import read_arguments, read_content, result_content
from phi4_mlx.server.apis.fields import Fields, check_json, read_body, shown
from phi4_mlx.server.apis.wire import WireError
from tests.unit.server.apis.harness import V, refused


def refusal(work: Callable[[], Any]) -> WireError:
    error = refused(work)
    assert "\n" not in error.message and len(error.message) < 400
    error.message.encode()
    return error


def test_a_refusal_names_the_field_its_value_and_the_limit() -> None:
    fields = Fields({"list": [{"n": 9}]})
    error = refusal(lambda: fields.children("list", 3)[0].integer("n", 1, 1, 8))
    assert error.message == "list[0].n must be a whole number from 1 to 8, not 9"
    assert error.param == "list[0].n"


@pytest.mark.parametrize("value", [True, "1", 1.5, [], {}, 0, 9, pytest.param(10**400, id="huge"), math.nan, math.inf])
def test_an_integer_is_no_other_type(value: Any) -> None:
    assert refusal(lambda: Fields({"n": value}).integer("n", 1, 1, 8)).param == "n"


def test_an_integer_may_be_written_as_a_float() -> None:
    value = Fields({"n": 8.0}).integer("n", 1, 1, 8)
    assert value == 8 and type(value) is int


@pytest.mark.parametrize("value", [False, "1", [], {}, -0.01, 2.01, pytest.param(-(10**400), id="huge"), math.nan])
def test_a_number_is_no_other_type(value: Any) -> None:
    assert refusal(lambda: Fields({"t": value}).number("t", 1.0, 0, 2)).param == "t"


@pytest.mark.parametrize("value", [1, True, [], {}, 1.5])
def test_text_is_no_other_type(value: Any) -> None:
    refusal(lambda: Fields({"t": value}).text("t", ""))


@pytest.mark.parametrize("value", [1, 0, "true", [], {}])
def test_a_boolean_is_no_other_type(value: Any) -> None:
    refusal(lambda: Fields({"t": value}).boolean("t", True))


def test_null_is_the_same_as_absent() -> None:
    for fields in (Fields({}), Fields(dict.fromkeys("abcdefg"))):
        assert fields.text("a", "x") == "x"
        assert fields.integer("b", 3, 0, 9) == 3
        assert fields.number("c", None, 0, 9) is None
        assert fields.boolean("d", True) is True
        assert fields.items("e", 9) == []
        assert fields.child("f").values == {}
        assert fields.one_of("g", ("x", "y"), "y") == "y"
        refusal(lambda fields=fields: fields.need("a"))
        fields.forbid("why", "a")


def test_limits_are_inclusive() -> None:
    fields = Fields({"n": 8, "t": 2, "s": "abc", "l": [1, 2]})
    assert fields.integer("n", 1, 8, 8) == 8
    assert fields.number("t", 1.0, 0, 2) == 2.0
    assert fields.text("s", "", 3, 3) == "abc"
    assert fields.items("l", 2, 2) == [1, 2]
    refusal(lambda: fields.text("s", "", 0, 2))
    refusal(lambda: fields.items("l", 1))
    refusal(lambda: fields.items("l", 3, 3))
    refusal(lambda: Fields({"s": ""}).text("s", "", 1))


@pytest.mark.parametrize("body", [None, [], "x", 1, True, 1.5])
def test_a_body_is_an_object(body: Any) -> None:
    assert "the body must be a JSON object" in refusal(lambda: read_body(body)).message


@pytest.mark.parametrize("bad", ["\ud800", "a\udfffb", "é\ud83d"])
def test_unpaired_surrogates_are_refused_at_any_place(bad: str) -> None:
    for body in ({"a": bad}, {bad: 1}, {"a": [{"b": [bad]}]}):
        assert "surrogate" in refusal(lambda body=body: read_body(body)).message
    assert read_body({"a": "\x00😀"}).get("a") == "\x00😀"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_at_any_place(bad: float) -> None:
    refusal(lambda: read_body({"a": [{"b": bad}]}))


def test_depth_is_limited() -> None:
    def nested(depth: int) -> Any:
        value: Any = 1
        for level in range(depth):
            value = [value] if level % 2 else {"a": value}
        return value

    check_json(nested(200), "it")
    assert "deeper than 200" in refusal(lambda: check_json(nested(201), "it")).message
    assert "deeper than 200" in refusal(lambda: check_json(nested(100_000), "it")).message


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ("a\nb", r"'a\nb'"),
        ("\ud800", r"'\ud800'"),
        ("x" * 61, "'" + "x" * 60 + "...'"),
        (1.5, "1.5"),
        (math.nan, "nan"),
        ([1, 2], "a list of 2"),
        ({}, "an object"),
    ],
)
def test_values_are_shown_short(value: Any, text: str) -> None:
    assert shown(value) == text
    assert shown(10**5000) == shown(-(10**5000)) == "a number of over 30 digits"


def test_sampling_is_openais_by_default() -> None:
    sampling = read_sampling(Fields({}), V)
    assert (sampling.temp, sampling.top_p, sampling.min_p, sampling.top_k, sampling.seed) == (1.0, 1.0, 0.0, 0, None)
    assert sampling.presence_penalty is sampling.frequency_penalty is sampling.repetition_penalty is None
    assert sampling.logit_bias == {}


def test_sampling_is_read() -> None:
    given = {
        "temperature": 0,
        "top_p": 0.5,
        "min_p": 0.1,
        "top_k": -1,
        "seed": -1,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.1,
        "logit_bias": {"0": -100, "999": 100.0},
    }
    sampling = read_sampling(Fields(given), V)
    assert (sampling.temp, sampling.top_p, sampling.min_p, sampling.top_k) == (0.0, 0.5, 0.1, 0)
    assert sampling.seed == 2**64 - 1
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (-2.0, 2.0, 1.1)
    assert sampling.logit_bias == {0: -100.0, 999: 100.0}


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 2.1},
        {"temperature": -1},
        {"temperature": "1"},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"top_k": 1.5},
        {"top_k": 2**31},
        {"top_k": -2},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
        {"seed": 1.5},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0},
        {"logit_bias": []},
        {"logit_bias": {"1000": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"1.5": 1}},
        {"logit_bias": {"²": 1}},
        {"logit_bias": {"": 1}},
        {"logit_bias": {"9" * 5000: 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {"1": "1"}},
        {"logit_bias": {"1": True}},
        {"logit_bias": {str(i): 1 for i in range(1_025)}},
    ],
)
def test_sampling_out_of_range_is_refused(given: dict[str, Any]) -> None:
    assert next(iter(given)) in refusal(lambda: read_sampling(Fields(given), V)).message


def test_stops() -> None:
    assert read_stop(Fields({})) == ()
    assert read_stop(Fields({"stop": "\n"})) == ("\n",)
    assert read_stop(Fields({"stop": ["a"] * 16})) == ("a",) * 16
    assert read_stop(Fields({"stop": ["x" * 1_000]})) == ("x" * 1_000,)
    assert read_stop(Fields({"stop": ""})) == read_stop(Fields({"stop": [""]})) == ()
    for bad in (5, [5], [[]], ["a"] * 17, ["x" * 1_001], {}, True, [None]):
        assert refusal(lambda bad=bad: read_stop(Fields({"stop": bad}))).param == "stop"


def test_model_and_max_tokens() -> None:
    assert read_model(Fields({"model": "phi:mine"})) == "phi:mine"
    for none in ({}, {"model": None}, {"model": ""}):
        assert read_model(Fields(none)) == ""
    for bad in ({"model": 5}, {"model": "x" * 257}):
        assert refusal(lambda bad=bad: read_model(Fields(bad))).param == "model"
    assert read_max_tokens(Fields({"max_tokens": None})) is None
    assert read_max_tokens(Fields({"max_tokens": 1_000_000})) == 1_000_000
    for value in (0, -1, -(10**400), 1_000_001, 10**400):
        assert read_max_tokens(Fields({"max_tokens": value})) is None  # as many as fit
    for value in ("5", 1.5, True):
        refusal(lambda value=value: read_max_tokens(Fields({"max_tokens": value})))


def test_text_parts_are_joined() -> None:
    kinds = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "\x00"}, {"type": "output_text", "text": ""}]
    assert read_content(Fields({"content": kinds})) == "a\x00"
    assert read_content(Fields({"content": [{"type": "refusal", "refusal": "no"}]})) == "no"
    assert read_content(Fields({"content": []})) == ""
    assert read_content(Fields({})) is None


@pytest.mark.parametrize("kind", ["image_url", "input_image", "image", "input_audio", "file", "document", ""])
def test_parts_that_are_not_text_are_refused(kind: str) -> None:
    error = refusal(lambda: read_content(Fields({"content": [{"type": "text", "text": ""}, {"type": kind}]})))
    assert "reads only text" in error.message and error.param == "content[1].type"


@pytest.mark.parametrize("bad", [5, True, {}, ["x", 5], [{}], [{"type": "text"}], [{"type": "text", "text": 5}]])
def test_malformed_content_is_refused(bad: Any) -> None:
    refusal(lambda: read_content(Fields({"content": bad})))


def test_arguments_of_earlier_calls() -> None:
    assert read_arguments(Fields({"arguments": '{"a": [1]}'})) == '{"a": [1]}'
    assert read_arguments(Fields({"arguments": ""})) == read_arguments(Fields({})) == "{}"


@pytest.mark.parametrize("written", ["{", "[]", "nul", '{"a": "\n"}', r'{"a": "\ud800"}', "[" * 100_000])
def test_arguments_are_kept_as_they_were_written(written: str) -> None:
    assert read_arguments(Fields({"arguments": written})) == written
    assert read_arguments(Fields({"arguments": {"a": "é"}})) == '{"a": "é"}'


def test_an_older_part_that_is_not_text_has_a_placeholder() -> None:
    fields = Fields({"content": [{"type": "text", "text": "see "}, {"type": "image_url", "image_url": {"url": "x"}}]})
    assert read_content(fields, placeholders=True) == "see [image_url left out: this model reads only text]"
    assert fields.ignored.paths() == ("content[1]",)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "thinking", "thinking": "hm"}, ""),
        ({"type": "redacted_thinking", "data": "x"}, ""),
        ({"type": "document", "title": "A", "source": {"type": "text", "data": "B"}}, "A\nB"),
        ({"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "C"}]}}, "C"),
        ({"type": "search_result", "source": "u", "title": "T", "content": [{"text": "c"}]}, "T\nu\nc"),
        ({"type": "tool_reference", "tool_name": "grep"}, "grep"),
        ({"text": "untyped"}, "untyped"),
    ],
)
def test_parts_with_text_are_read(part: Any, text: str) -> None:
    assert read_content(Fields({"content": [part]})) == text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("a", "a"),
        (["a", "b"], "ab"),
        ([1, 2], "[1, 2]"),
        ({"a": 1}, '{"a": 1}'),
        ([{"title": "T", "n": 1}], '[{"title": "T", "n": 1}]'),
        ({"output": "x", "exit_code": 1}, '{"output": "x", "exit_code": 1}'),
        ([{"type": "text", "text": None}, {"type": "text", "text": "a"}], "a"),
        (
            {"type": "encrypted_result", "encrypted_stdout": "zz"},
            "[encrypted_result left out: this model reads only text]",
        ),
        (5, "5"),
        ([{"type": "web_search_result", "title": "T", "url": "u", "encrypted_content": "zzz"}], "T\nu"),
        ({"type": "code_execution_result", "stdout": "1", "stderr": "", "return_code": 0}, "1"),
        ([{"type": "image", "source": {"data": "AAAA"}}], "[image left out: this model reads only text]"),
    ],
)
def test_a_result_of_any_shape_is_text(content: Any, text: str) -> None:
    assert result_content(Fields({"content": content})) == text


def test_fields_that_are_not_read_are_named_once() -> None:
    fields = read_body({"a": 1, "b": None, "c": [], "list": [{"x": 1, "y": 2}, {"x": 1, "y": 2}], "né\n,": 5})
    for each in fields.children("list", 3):
        each.integer("x", 1, 0, 9)
    fields.child("child")
    assert fields.ignored.paths() == ("a", "n???", "list[].y")
    fields.ignore("a")
    fields.children("list", 3)[1].ignore()
    assert fields.ignored.paths() == ("a", "list[1]", "n???")


def test_what_is_named_of_a_large_body_is_limited() -> None:
    fields = read_body({"list": [{f"f{n}": 1} for n in range(5_000)]})
    for each in fields.children("list", 5_000):
        each.ignored.add(each.path)
    assert len(fields.ignored.paths()) == 2_000


def test_a_tool_is_read() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "string"}}}
    tool = read_tool(Fields({"name": "f", "description": "d", "input_schema": schema, "other": 1}), "input_schema")
    assert tool == {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}
    untyped = read_tool(Fields({"name": "f", "parameters": {"properties": {"a": {}}}}))
    assert untyped["function"]["parameters"] == {"type": "object", "properties": {"a": {}}}
    bare = read_tool(Fields({"name": "f"}))
    assert bare["function"]["parameters"]["properties"] == {}


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"name": ""},
        {"name": 5},
        {"name": "x" * 300},
        {"name": "auto"},
        {"name": "f", "description": 5},
        {"name": "f", "parameters": []},
    ],
)
def test_a_tool_that_cannot_be_served_is_refused(bad: dict[str, Any]) -> None:
    refusal(lambda: read_tool(Fields(bad, "tools[0]")))


def test_tool_choice_fits_the_tools() -> None:
    tools = [read_tool(Fields({"name": name})) for name in ("f", "g")]
    fields = Fields({})
    for choice in ("none", "auto", "required", "g"):
        assert check_tool_choice(fields, tools, choice) == choice
    assert check_tool_choice(fields, [], "auto") == "none"
    refusal(lambda: check_tool_choice(fields, tools, "h"))
    refusal(lambda: check_tool_choice(fields, [], "required"))
    refusal(lambda: check_tool_choice(fields, [], "f"))
    assert fields.ignored.paths() == ()
    assert check_tool_choice(fields, tools, "bash", ["bash"]) == "auto"
    assert check_tool_choice(fields, [], "required", ["bash"]) == "none"
    assert fields.ignored.paths() == ("tool_choice",)


def test_a_schema_is_any_object() -> None:
    def read(schema: Any) -> Any:
        return read_schema(Fields({"schema": schema}), "schema")

    for fine in ({"description": "x" * 70_000}, {"items": {"$ref": "https://example.com/s"}}):
        assert read(fine) == fine
    for bad in ([], 5):
        refusal(lambda bad=bad: read(bad))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, ("json_object",)),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}}, ("json_schema", {"a": 1})),
        ({"type": "json_schema", "name": "x", "schema": {"a": 1}}, ("json_schema", {"a": 1})),
        ({"type": "regex", "pattern": "a+"}, ("regex", "a+")),
        ({"type": "choice", "choices": ["a", "b"]}, ("choice", ("a", "b"))),
        ({"type": "grammar", "grammar": "start: x"}, ("grammar", "start: x")),
    ],
)
def test_response_formats(given: Any, wanted: Any) -> None:
    assert read_response_format(Fields({"response_format": given})) == wanted


@pytest.mark.parametrize(
    "bad",
    [
        "json_object",
        {},
        {"type": "xml"},
        {"type": ["json_object"]},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": True}},
        {"type": "regex"},
        {"type": "regex", "pattern": ""},
        {"type": "regex", "pattern": "a" * 70_000},
        {"type": "choice", "choices": []},
        {"type": "choice", "choices": [1]},
        {"type": "choice", "choices": ["a"] * 1_001},
        {"type": "grammar"},
    ],
)
def test_malformed_response_formats_are_refused(bad: Any) -> None:
    refusal(lambda: read_response_format(Fields({"response_format": bad})))

"""Calls in an answer: the thirteen ways to write them, what is text, and what streaming holds back."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.tools.calls import ToolCall, ToolCallParser, ToolReply, parse_tool_calls

ARGUMENTS = {"city": "Köln ] } \" <|/tool_call|>", "days": [1, [2, {"a": []}]], "x": None}
CALL = ToolCall("get_weather", ARGUMENTS)
TOOLS = ["get_weather", "now"]
ONE = json.dumps({"name": "get_weather", "arguments": ARGUMENTS})
TWO = json.dumps({"name": "now", "arguments": {}})
NOW = ToolCall("now", {})
CUT = "the answer ends inside a tool call, which is left as text; allow it more tokens"

FORMS: dict[str, tuple[str, tuple[ToolCall, ...], str]] = {
    "1 tags": (f"<|tool_call|>[{ONE}, {TWO}]<|/tool_call|>", (CALL, NOW), ""),
    "2 no closing tag": (f"Sure.\n<|tool_call|>[{ONE}]", (CALL,), "Sure.\n"),
    "2 half a closing tag": (f"<|tool_call|>[{ONE}]<|/tool_c", (CALL,), ""),
    "3 a single object": (f"<|tool_call|>{ONE}<|/tool_call|>", (CALL,), ""),
    "4 several blocks": (f"<|tool_call|>{ONE}<|/tool_call|>\n<|tool_call|>[{TWO}]<|/tool_call|>\n", (CALL, NOW), ""),
    "4 without closing tags": (f"<|tool_call|>{ONE}<|tool_call|>[{TWO}]", (CALL, NOW), ""),
    "5 commas and no brackets": (f"<|tool_call|>{ONE} ,\n{TWO}<|/tool_call|>", (CALL, NOW), ""),
    "6 items as strings": (f"<|tool_call|>[{json.dumps(ONE)}, {json.dumps(TWO)}]<|/tool_call|>", (CALL, NOW), ""),
    "6 strings alone": (f"<|tool_call|>{json.dumps(ONE)}", (CALL,), ""),
    "7 functools": (f"functools[{ONE}]", (CALL,), ""),
    "7 with text around": (f"I look: functools [\n {ONE} ] and functools[{TWO}]\n.", (CALL, NOW), "I look: and ."),
    "8 a bare list": (f" [{ONE}, {TWO}]\n", (CALL, NOW), ""),
    "8 a bare object": (ONE, (CALL,), ""),
    "8 bare objects": (f"{ONE},\n{TWO}", (CALL, NOW), ""),
    "9 a fence": (f"```json\n[{ONE}]\n```\n", (CALL,), ""),
    "9 a fence without a name": (f"```\n{ONE}\n```", (CALL,), ""),
    "9 a fence that never ends": (f"```json\n{ONE}\n``", (CALL,), ""),
    "10 parameters": (f"<|tool_call|>{ONE.replace('arguments', 'parameters')}", (CALL,), ""),
    "11 arguments as a string": (
        f"<|tool_call|>{json.dumps({'name': 'get_weather', 'arguments': json.dumps(ARGUMENTS)})}", (CALL,), "",
    ),
    "11 an empty string": ('<|tool_call|>{"name": "now", "arguments": ""}', (NOW,), ""),
    "12 openai": (f'[{{"id": "call_1", "type": "function", "function": {ONE}}}]', (CALL,), ""),
    "13 tool request": (f"Yes. [TOOL_REQUEST]{ONE}[END_TOOL_REQUEST] Done.", (CALL,), "Yes. Done."),
    "13 at the start": (f"[TOOL_REQUEST]\n{ONE}\n[END_TOOL_REQUEST]\n", (CALL,), ""),
    "no arguments": ('<|tool_call|>[{"name": "now"}]', (NOW,), ""),
    "a null": ('<|tool_call|>[{"name": "now", "arguments": null}]', (NOW,), ""),
    "the last of two keys": ('<|tool_call|>[{"name": "x", "name": "now", "arguments": {}}]', (NOW,), ""),
    "a marker before it": (f"<|tool_call|>functools[{ONE}]", (CALL,), "<|tool_call|>"),
    "a bracket before it": (f"[[TOOL_REQUEST]{ONE}", (CALL,), "["),
    "a word before it": (f"[functools[{TWO}]]", (NOW,), "[]"),
    "a comma behind it": (f"<|tool_call|>{ONE}, as asked", (CALL,), ", as asked"),
    "words that touch it": (f"A<|tool_call|>{TWO}<|/tool_call|> B", (NOW,), "A B"),
    "words and white space that touch two": (
        f"A<|tool_call|>{TWO}<|/tool_call|>\n<|tool_call|>{TWO}<|/tool_call|> B", (NOW, NOW), "A\nB",
    ),
    "white space at the end": (f"A<|tool_call|>{TWO}<|/tool_call|>\n", (NOW,), "A"),
    "white space at the start": (f" <|tool_call|>{TWO}<|/tool_call|>B", (NOW,), "B"),
    "white space in a string": ('<|tool_call|>{"name": "now", "arguments": " {} \\n"}', (NOW,), ""),
    "a value behind functools": (f"functools[{TWO}], {TWO}", (NOW,), f", {TWO}"),
    "a line break in a string": (
        '<|tool_call|>[{"name": "get_weather", "arguments": {"a": "1\n2"}}]',
        (ToolCall("get_weather", {"a": "1\n2"}),), "",
    ),
}  # fmt: skip

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TEXTS: dict[str, tuple[str, str | None]] = {
    "nothing": ("", None),
    "white space": (" \n ", None),
    "prose": ("The tag `<|tool_call|>` begins a call, <|/tool_call|> ends it, functools too.", None),
    "half markers": ("<|tool <|too [TOOL [TOOL_REQ functool ``", None),
    "python": ("functools[0], functools['a'] and functools[[1, 2]]", None),
    "a list": ("[1, 2, 3]", None),
    "an empty list": ("<|tool_call|>[]<|/tool_call|>", None),
    "a link": ("[see](https://x.y) {for} [more]", None),
    "JSON": ('{"city": "Köln", "days": [1]}', None),
    "JSON in a fence": ('```json\n{"city": "Köln"}\n```', None),
    "a call with text behind it": (f"{ONE} is how to call it", None),
    "a call with text before it": (f"It is {ONE}", None),
    "a fence with text behind it": (f"```json\n{ONE}\n```\nis how", None),
    "a fence with text before it": (f"So:\n```json\n{ONE}\n```", None),
    "a fence of another language": (f"```python\n{ONE}\n```", None),
    "a bare call of an unknown tool": ('{"name": "rm", "arguments": {}}', None),
    "a bare name": ('{"name": "now"}', None),
    "a call in a string": (json.dumps({"text": f"<|tool_call|>[{ONE}]<|/tool_call|>"}), None),
    "a call in a string of a call that fails": (
        '<|tool_call|>[{"name": "rm", "arguments": {"a": ' + json.dumps(f"functools[{ONE}]") + "}}]",
        "a tool call is left as text, since 'rm' is none of the tools: 'get_weather', 'now'",
    ),
    "an unknown tool": (
        f'Hm. <|tool_call|>[{ONE}, {{"name": "rm", "arguments": {{}}}}]<|/tool_call|>',
        "a tool call is left as text, since 'rm' is none of the tools: 'get_weather', 'now'",
    ),
    "a schema": (
        f"<|tool_call|>[{json.dumps({'name': 'now', 'description': 'Time', 'parameters': SCHEMA})}]",
        "a tool call is left as text, since it is no call of 'now' but has the keys 'name, description, parameters'",
    ),
    "a schema without a description": (
        f"functools[{json.dumps({'name': 'now', 'parameters': SCHEMA})}]",
        "a tool call is left as text, since it repeats the declaration of 'now'",
    ),
    "a flat schema": (
        '<|tool_call|>{"name": "now", "arguments": {"zone": {"type": "str", "description": "of time"}}}',
        "a tool call is left as text, since it repeats the declaration of 'now'",
    ),
    "a bare schema": (json.dumps({"name": "now", "parameters": SCHEMA}), None),
    "a tool": (
        f"<|tool_call|>{json.dumps({'type': 'function', 'function': {'name': 'now', 'parameters': SCHEMA}})}",
        "a tool call is left as text, since it repeats the declaration of 'now'",
    ),
    "a call of another type": (f'[{{"type": "tool", "function": {ONE}}}]', None),
    "functools without brackets": (f"functools{ONE}", None),
    "broken JSON": ('{"name": now}', None),
    "digits in a list": (
        f"[{'1' * 5000}]",
        f"a tool call is left as text, since '{'1' * 20}' begins no number of at most 4300 characters",
    ),
    **{
        f"a slip: {slip}": (f'<|tool_call|>[{{"a": {slip}', f"a tool call is left as text, since {why}")
        for slip, why in {
            "}": "'}' is not JSON where it stands", "1,}": "'}' is not JSON where it stands",
            "1]": "']' is not JSON where it stands", "[1,]": "']' is not JSON where it stands",
            "[}": "'}' is not JSON where it stands", '1 "b"': "'\"' is not JSON where it stands",
            '"b" "c"': "'\"' is not JSON where it stands", "tru}": "'t' is not JSON where it stands",
            "\xa01": r"'\xa0' is not JSON where it stands", '"\\x"': "a string in it has a broken escape",
            '"\\u12G4"': "a string in it has a broken escape",
            "01}": "'01' begins no number of at most 4300 characters",
        }.items()
    },
    "a call in what is no wrapper": (f'[{{"function": {ONE}, "description": "Gives the weather"}}]', None),
    "both": (
        '<|tool_call|>{"name": "now", "arguments": {}, "parameters": {}}',
        "a tool call is left as text, since it is no call of 'now' but has the keys 'name, arguments, parameters'",
    ),
    "no object": (
        '<|tool_call|>{"name": "now", "arguments": [1]}',
        "a tool call is left as text, since the arguments of 'now' are no object",
    ),
    "no JSON in a string": (
        '<|tool_call|>{"name": "now", "arguments": "{a}"}',
        "a tool call is left as text, since a string in it that should hold JSON does not",
    ),
    "no JSON": (
        f"<|tool_call|>[{ONE[:-1]}, arguments: 1}}]<|/tool_call|>",
        "a tool call is left as text, since 'a' is not JSON where it stands",
    ),
    "NaN": (
        '<|tool_call|>[{"name": "now", "arguments": {"a": NaN}}]',
        "a tool call is left as text, since 'N' is not JSON where it stands",
    ),
    "Infinity": (
        '<|tool_call|>[{"name": "now", "arguments": {"a": -Infinity}}]',
        "a tool call is left as text, since '-' begins no number of at most 4300 characters",
    ),
    "a number beyond all": (
        '<|tool_call|>[{"name": "now", "arguments": {"a": 1e999}}]',
        "a tool call is left as text, since the arguments of 'now' hold half a surrogate pair or a number beyond all",
    ),
    "half a surrogate pair": (
        '<|tool_call|>[{"name": "now", "arguments": {"a": "\\ud83d"}}]',
        "a tool call is left as text, since the arguments of 'now' hold half a surrogate pair or a number beyond all",
    ),
    "digits": (
        f'<|tool_call|>[{{"name": "now", "arguments": {{"a": {"1" * 5000}}}}}]',
        f"a tool call is left as text, since '{'1' * 20}' begins no number of at most 4300 characters",
    ),
    "depth": ("[" * 100_000, "a tool call is left as text, since it is nested deeper than 200 brackets"),
    "depth of objects": (
        '<|tool_call|>{"name": "now", "arguments": ' + '{"a":' * 100_000,
        "a tool call is left as text, since it is nested deeper than 200 brackets",
    ),
    "depth in a string": (
        '<|tool_call|>{"name": "now", "arguments": "' + '[' * 100_000 + '"}',
        "a tool call is left as text, since a string in it that should hold JSON does not",
    ),
    "a comma at the end": (f"<|tool_call|>{ONE},", CUT),
    "a marker at the end": ("So: <|tool_call|>", CUT),
    "one bracket": ("[", CUT),
}  # fmt: skip


def streamed(text: str, tools: Any, pieces: list[str] | None = None) -> ToolReply:
    parser = ToolCallParser(tools)
    shown = "".join([*map(parser.add, text if pieces is None else pieces), parser.finish()])
    return ToolReply(shown, parser.calls, parser.error)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_whole_and_split_at_every_character(form: str) -> None:
    text, calls, shown = FORMS[form]
    expected = ToolReply(shown, calls, None)
    assert parse_tool_calls(text, TOOLS) == expected
    assert streamed(text, TOOLS) == expected
    for at in range(len(text)):
        assert streamed(text, TOOLS, [text[:at], text[at:]]) == expected, text[:at]


@pytest.mark.parametrize("kind", TEXTS)
def test_what_is_no_call_is_text_to_the_character(kind: str) -> None:
    text, error = TEXTS[kind]
    assert parse_tool_calls(text, TOOLS) == ToolReply(text, (), error)
    assert streamed(text, TOOLS) == ToolReply(text, (), error)


@pytest.mark.parametrize(
    ("before", "body"),
    [
        ("<|tool_call|>", f"[{ONE}, {TWO}]"), ("Sure. <|tool_call|>", ONE), ("<|tool_call|>", f"[{json.dumps(ONE)}]"),
        ("I look: functools", f"[{ONE}]"), ("[TOOL_REQUEST]", ONE), ("```json\n", f"[{ONE}]"), ("```\n", ONE),
        ("", f"[{ONE}, {TWO}]"), (" ", ONE), ("<|tool_call|>", f"[{{\"type\": \"function\", \"function\": {ONE}}}]"),
    ],
)  # fmt: skip
def test_a_call_that_is_cut_anywhere_is_text_and_an_error(before: str, body: str) -> None:
    assert parse_tool_calls(before + body, TOOLS).calls
    for end in range(1, len(body)):
        text = before + body[:end]
        assert parse_tool_calls(text, TOOLS) == streamed(text, TOOLS) == ToolReply(text, (), CUT)


def test_of_calls_between_commas_all_stand_or_none() -> None:
    text = f"<|tool_call|>{ONE}, {TWO}"
    for end in range(text.rindex(",", 0, text.rindex("{", 0, -4)), len(text)):
        assert parse_tool_calls(text[:end], TOOLS).calls == ((CALL,) if text[:end].endswith(ONE) else ())


def test_calls_before_one_that_is_cut_stand() -> None:
    text = f"Both: <|tool_call|>{TWO}<|/tool_call|>\n<|tool_call|>{ONE[:-3]}"
    assert parse_tool_calls(text, TOOLS) == ToolReply(f"Both: <|tool_call|>{ONE[:-3]}", (NOW,), CUT)


def test_calls_behind_one_that_is_broken_stand() -> None:
    broken = '<|tool_call|>[{"name": "now", arguments}]<|/tool_call|>'
    reply = parse_tool_calls(f"{broken}\n<|tool_call|>{TWO}<|/tool_call|>", TOOLS)
    assert reply.text == broken + "\n" and reply.calls == (NOW,)
    assert reply.error == "a tool call is left as text, since 'a' is not JSON where it stands"


def test_of_two_errors_the_first_is_told() -> None:
    text = f'functools[{{"name": "rm", "arguments": {{}}}}] <|tool_call|>{ONE[:-3]}'
    error = "a tool call is left as text, since 'rm' is none of the tools: 'get_weather', 'now'"
    assert parse_tool_calls(text, TOOLS) == ToolReply(text, (), error)


def test_without_tools_all_is_text_at_once() -> None:
    parser = ToolCallParser([])
    for text in (f"<|tool_call|>[{ONE}", "]<|/tool_call|>", "functools[", "[TOOL", "<|"):
        assert parser.add(text) == text
    assert parser.finish() == "" and parser.calls == () and parser.error is None


@pytest.mark.parametrize("text", [ONE, f"[{ONE}]", f"```json\n{ONE}\n```", f" {TWO}"])
def test_json_is_a_call_only_behind_a_marker_where_that_is_asked(text: str) -> None:
    assert parse_tool_calls(text, TOOLS).calls
    parser = ToolCallParser(TOOLS, marked=True)
    assert parser.add(text) + parser.finish() == text and not parser.calls and parser.error is None
    parser = ToolCallParser(TOOLS, marked=True)
    assert parser.add(f"<|tool_call|>{ONE}<|/tool_call|>") + parser.finish() == "" and parser.calls == (CALL,)
    assert ToolCallParser([], marked=True).add("<|tool") == "<|tool"


def test_only_what_may_be_a_call_is_held_back() -> None:
    parser = ToolCallParser(TOOLS)
    steps = [
        ("  ", ""), ("Hi", "  Hi"), (" there <", " there "), ("|", ""), ("b", "<|b"), (" [TOOL", " "),
        ("S]", "[TOOLS]"),
        (" func", " "), ("tion ", "function "), ("{a} ", "{a} "), ("<|tool_call|>", ""), ("[", ""),
        ("x", "<|tool_call|>[x"),
    ]  # fmt: skip
    for text, certain in steps:
        assert parser.add(text) == certain, text
    assert parser.add("<|tool_call|>" + TWO) == ""
    assert parser.calls == ()  # a comma and another may follow
    assert parser.add("<|/tool_call|>") == "" and parser.calls == (NOW,)
    assert parser.add(" done functools[" + TWO) == " done "
    assert parser.add("]") == "" and parser.calls == (NOW, NOW)  # no comma may follow
    assert parser.finish() == ""


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["[", "1", "] ", "is", " it"], ["", "", "", "[1] is", " it"]),
        (['{"a"', ": ", "b", "}"], ["", "", '{"a": b', "}"]),
        (["``", "`py", "\n{"], ["", "```py", "\n{"]),
        (["```json", "\n[1]", "\n```", "\n", "x"], ["", "", "", "", "```json\n[1]\n```\nx"]),
    ],
)
def test_json_at_the_start_is_text_as_soon_as_it_cannot_be_the_whole_answer(
    pieces: list[str], shown: list[str]
) -> None:
    parser = ToolCallParser(TOOLS)
    assert [parser.add(piece) for piece in pieces] == shown
    assert parser.finish() == ""


def test_a_declared_argument_that_is_an_object_may_look_like_a_schema() -> None:
    parameters = {"schema": {"type": "object", "description": "A schema"}, "n": {"type": "int"}}
    tool = {"name": "check", "parameters": parameters}
    call = {"name": "check", "arguments": {"schema": {"type": "string"}}}
    assert parse_tool_calls(json.dumps(call), [tool]).calls == (ToolCall(**call),)
    assert parse_tool_calls(json.dumps(call), ["check"]).calls == ()  # by name alone that cannot be known
    for echoed in (parameters, {"n": {"type": "int"}}, {"n": {"description": "A number"}}):
        text = json.dumps({"name": "check", "arguments": echoed})
        assert parse_tool_calls(text, [tool]) == ToolReply(text, (), None)


def test_the_openai_spelling_of_a_declared_type_is_an_echo_too() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "minLength": 1}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for echoed in (parameters, *({"a": {"type": kind, "minLength": 1}} for kind in ("string", "str"))):
        text = json.dumps({"name": "f", "arguments": echoed})
        assert parse_tool_calls(text, [tool]) == ToolReply(text, (), None)


def test_arguments_called_type_and_properties_may_be_just_that() -> None:
    tool = {"name": "mesh", "parameters": {"type": {"type": "str"}, "properties": {"type": "dict"}}}
    call = {"name": "mesh", "arguments": {"type": "object", "properties": {"a": 1}}}
    assert parse_tool_calls(json.dumps(call), [tool]).calls == (ToolCall(**call),)


def test_functions_are_tools() -> None:
    def now() -> str:
        return ""

    assert parse_tool_calls(f"functools[{TWO}]", [now]) == ToolReply("", (NOW,), None)


@pytest.mark.parametrize("tools", ["now", {"name": "now"}, [5], [{}]])
def test_malformed_tools_are_refused(tools: Any) -> None:
    with pytest.raises(RequestError):
        parse_tool_calls("", tools)


def test_a_call_in_openais_form() -> None:
    message = CALL.message("call_7")
    assert message == {
        "id": "call_7", "type": "function",
        "function": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS, ensure_ascii=False)},
    }  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        CALL.name = "x"  # type: ignore[misc]


SIZE = 500_000
HOSTILE = {
    "markers": "<|tool_call|>", "open": "<|tool_call|>[", "functools": "functools[", "strings": '<|tool_call|>["',
    "halves": "<|", "blocks": "<|tool_call|>[{}]", "requests": "[TOOL_REQUEST]{", "unknown": 'functools[{"name": "x"}]',
}  # fmt: skip
ENDLESS = {
    "depth": ("<|tool_call|>", "["), "list": ("<|tool_call|>[", "[],"), "string": ('<|tool_call|>["', "<|tool_call|>["),
    "escapes": ('functools["', '\\"'), "number": ("functools[", "1"), "space": ("<|tool_call|>{}", " "),
    "start": ("", " "), "bare": ("[", "{},"), "fence": ("```json\n[]\n```", "\n"), "commas": ("<|tool_call|>{}", ",[]"),
}  # fmt: skip


@pytest.mark.parametrize(("before", "unit"), [*(("", unit) for unit in HOSTILE.values()), *ENDLESS.values()])
def test_time_is_linear_in_the_answer(before: str, unit: str) -> None:
    """Half a megabyte at once, and a tenth of it by the character; what is quadratic takes minutes."""
    text = before + unit * (SIZE // len(unit))
    started = time.process_time()
    reply = parse_tool_calls(text, TOOLS)
    assert time.process_time() - started < 8
    assert reply.text == text and reply.calls == ()
    short = text[: SIZE // 10]
    started = time.process_time()
    assert streamed(short, TOOLS) == parse_tool_calls(short, TOOLS)
    assert time.process_time() - started < 4

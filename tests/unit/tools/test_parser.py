"""The parser of tool calls: the thirteen forms of a call, what stays text, and what streaming withholds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.parser import ToolCallParser
from tests.tool_replies import Reply, parsed, parsed_pieces

ARGUMENTS = {"city": 'Köln ] } " <|/tool_call|>', "days": [1, [2, {"a": []}]], "x": None}
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
        "a tool call is left as text: 'rm' is not one of the tools: 'get_weather', 'now'",
    ),
    "an unknown tool": (
        f'Hm. <|tool_call|>[{ONE}, {{"name": "rm", "arguments": {{}}}}]<|/tool_call|>',
        "a tool call is left as text: 'rm' is not one of the tools: 'get_weather', 'now'",
    ),
    "a schema": (
        f"<|tool_call|>[{json.dumps({'name': 'now', 'description': 'Time', 'parameters': SCHEMA})}]",
        "a tool call is left as text: it is not a call of 'now': its keys are 'name, description, parameters'",
    ),
    "a schema without a description": (
        f"functools[{json.dumps({'name': 'now', 'parameters': SCHEMA})}]",
        "a tool call is left as text: it repeats the declaration of 'now'",
    ),
    "a flat schema": (
        '<|tool_call|>{"name": "now", "arguments": {"zone": {"type": "str", "description": "of time"}}}',
        "a tool call is left as text: it repeats the declaration of 'now'",
    ),
    "a bare schema": (json.dumps({"name": "now", "parameters": SCHEMA}), None),
    "a tool": (
        f"<|tool_call|>{json.dumps({'type': 'function', 'function': {'name': 'now', 'parameters': SCHEMA}})}",
        "a tool call is left as text: it repeats the declaration of 'now'",
    ),
    "a call of another type": (f'[{{"type": "tool", "function": {ONE}}}]', None),
    "functools without brackets": (f"functools{ONE}", None),
    "broken JSON": ('{"name": now}', None),
    "digits in a list": (
        f"[{'1' * 5000}]",
        f"a tool call is left as text: '{'1' * 20}' does not begin a number of at most 4300 characters",
    ),
    **{
        f"a slip: {slip}": (f'<|tool_call|>[{{"a": {slip}', f"a tool call is left as text: {why}")
        for slip, why in {
            "}": "'}' is not valid JSON at this point", "1,}": "'}' is not valid JSON at this point",
            "1]": "']' is not valid JSON at this point", "[1,]": "']' is not valid JSON at this point",
            "[}": "'}' is not valid JSON at this point", '1 "b"': "'\"' is not valid JSON at this point",
            '"b" "c"': "'\"' is not valid JSON at this point", "tru}": "'t' is not valid JSON at this point",
            "\xa01": r"'\xa0' is not valid JSON at this point", '"\\x"': "a string in it has an invalid escape",
            '"\\u12G4"': "a string in it has an invalid escape",
            "01}": "'01' does not begin a number of at most 4300 characters",
        }.items()
    },
    "a call in an unknown wrapper": (f'[{{"function": {ONE}, "description": "Gives the weather"}}]', None),
    "both": (
        '<|tool_call|>{"name": "now", "arguments": {}, "parameters": {}}',
        "a tool call is left as text: it is not a call of 'now': its keys are 'name, arguments, parameters'",
    ),
    "arguments in a list": (
        '<|tool_call|>{"name": "now", "arguments": [1]}',
        "a tool call is left as text: the arguments of 'now' are not an object",
    ),
    "a string without JSON": (
        '<|tool_call|>{"name": "now", "arguments": "{a}"}',
        "a tool call is left as text: a string in it should contain JSON and does not",
    ),
    "broken JSON in tags": (
        f"<|tool_call|>[{ONE[:-1]}, arguments: 1}}]<|/tool_call|>",
        "a tool call is left as text: 'a' is not valid JSON at this point",
    ),
    "NaN": (
        '<|tool_call|>[{"name": "now", "arguments": {"a": NaN}}]',
        "a tool call is left as text: 'N' is not valid JSON at this point",
    ),
    "Infinity": (
        '<|tool_call|>[{"name": "now", "arguments": {"a": -Infinity}}]',
        "a tool call is left as text: '-' does not begin a number of at most 4300 characters",
    ),
    "a number that is too large": (
        '<|tool_call|>[{"name": "now", "arguments": {"a": 1e999}}]',
        "a tool call is left as text: the arguments of 'now' contain half a surrogate pair or too large a number",
    ),
    "half a surrogate pair": (
        '<|tool_call|>[{"name": "now", "arguments": {"a": "\\ud83d"}}]',
        "a tool call is left as text: the arguments of 'now' contain half a surrogate pair or too large a number",
    ),
    "digits": (
        f'<|tool_call|>[{{"name": "now", "arguments": {{"a": {"1" * 5000}}}}}]',
        f"a tool call is left as text: '{'1' * 20}' does not begin a number of at most 4300 characters",
    ),
    "depth": ("[" * 100_000, "a tool call is left as text: it is nested deeper than 200 brackets"),
    "depth of objects": (
        '<|tool_call|>{"name": "now", "arguments": ' + '{"a":' * 100_000,
        "a tool call is left as text: it is nested deeper than 200 brackets",
    ),
    "depth in a string": (
        '<|tool_call|>{"name": "now", "arguments": "' + '[' * 100_000 + '"}',
        "a tool call is left as text: a string in it should contain JSON and does not",
    ),
    "a comma at the end": (f"<|tool_call|>{ONE},", CUT),
    "a marker at the end": ("So: <|tool_call|>", CUT),
    "one bracket": ("[", CUT),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_whole_and_split_at_every_character(form: str) -> None:
    text, calls, shown = FORMS[form]
    expected = Reply(shown, calls, None)
    assert parsed(text, TOOLS) == expected
    assert parsed_pieces(text, TOOLS) == expected
    for at in range(len(text)):
        assert parsed_pieces([text[:at], text[at:]], TOOLS) == expected, text[:at]


@pytest.mark.parametrize("kind", TEXTS)
def test_text_without_a_call_is_unchanged(kind: str) -> None:
    text, error = TEXTS[kind]
    assert parsed(text, TOOLS) == Reply(text, (), error)
    assert parsed_pieces(text, TOOLS) == Reply(text, (), error)


@pytest.mark.parametrize(
    ("before", "body"),
    [
        ("<|tool_call|>", f"[{ONE}, {TWO}]"), ("Sure. <|tool_call|>", ONE), ("<|tool_call|>", f"[{json.dumps(ONE)}]"),
        ("I look: functools", f"[{ONE}]"), ("[TOOL_REQUEST]", ONE), ("```json\n", f"[{ONE}]"), ("```\n", ONE),
        ("", f"[{ONE}, {TWO}]"), (" ", ONE), ("<|tool_call|>", f"[{{\"type\": \"function\", \"function\": {ONE}}}]"),
    ],
)  # fmt: skip
def test_a_call_that_is_cut_off_is_text_with_an_error(before: str, body: str) -> None:
    assert parsed(before + body, TOOLS).calls
    for end in range(1, len(body)):
        text = before + body[:end]
        assert parsed(text, TOOLS) == parsed_pieces(text, TOOLS) == Reply(text, (), CUT)


def test_calls_joined_by_commas_count_all_or_none() -> None:
    text = f"<|tool_call|>{ONE}, {TWO}"
    for end in range(text.rindex(",", 0, text.rindex("{", 0, -4)), len(text)):
        assert parsed(text[:end], TOOLS).calls == ((CALL,) if text[:end].endswith(ONE) else ())


def test_calls_before_one_that_is_cut_off_are_kept() -> None:
    text = f"Both: <|tool_call|>{TWO}<|/tool_call|>\n<|tool_call|>{ONE[:-3]}"
    assert parsed(text, TOOLS) == Reply(f"Both: <|tool_call|>{ONE[:-3]}", (NOW,), CUT)


def test_calls_after_a_malformed_one_are_kept() -> None:
    broken = '<|tool_call|>[{"name": "now", arguments}]<|/tool_call|>'
    reply = parsed(f"{broken}\n<|tool_call|>{TWO}<|/tool_call|>", TOOLS)
    assert reply.text == broken + "\n" and reply.calls == (NOW,)
    assert reply.error == "a tool call is left as text: 'a' is not valid JSON at this point"


def test_the_first_of_two_errors_is_reported() -> None:
    text = f'functools[{{"name": "rm", "arguments": {{}}}}] <|tool_call|>{ONE[:-3]}'
    error = "a tool call is left as text: 'rm' is not one of the tools: 'get_weather', 'now'"
    assert parsed(text, TOOLS) == Reply(text, (), error)


def test_without_tools_everything_is_text_at_once() -> None:
    parser = ToolCallParser([])
    for text in (f"<|tool_call|>[{ONE}", "]<|/tool_call|>", "functools[", "[TOOL", "<|"):
        assert parser.add(text) == text
    assert parser.finish() == "" and parser.calls == () and parser.error is None


@pytest.mark.parametrize("text", [ONE, f"[{ONE}]", f"```json\n{ONE}\n```", f" {TWO}"])
def test_with_marked_only_json_after_a_marker_is_a_call(text: str) -> None:
    assert parsed(text, TOOLS).calls
    parser = ToolCallParser(TOOLS, marked=True)
    assert parser.add(text) + parser.finish() == text and not parser.calls and parser.error is None
    parser = ToolCallParser(TOOLS, marked=True)
    assert parser.add(f"<|tool_call|>{ONE}<|/tool_call|>") + parser.finish() == "" and parser.calls == (CALL,)
    assert ToolCallParser([], marked=True).add("<|tool") == "<|tool"


def test_only_text_that_may_begin_a_call_is_withheld() -> None:
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
    assert parser.add("]") == "" and parser.calls == (NOW, NOW)  # this form ends with its bracket
    assert parser.finish() == ""


@pytest.mark.parametrize("text", [f"so <|tool_call|>[{ONE}]<|/tool_call|>", ONE, f"```json\n{ONE}\n```", f"[{ONE}]"])
def test_a_call_that_is_cut_before_its_end_is_text(text: str) -> None:
    complete = text.rfind("]<|") + 1 or len(text)
    for end in range(1, complete):
        parser = ToolCallParser(TOOLS)
        shown = parser.add(text[:end])
        parser.cut()
        shown += parser.add(text[end:])  # an end that max_tokens forced, for instance
        assert (shown + parser.finish(), parser.calls) == (text, ()), text[:end]
    assert parsed(text, TOOLS).calls


def test_calls_before_a_cut_are_kept() -> None:
    parser = ToolCallParser(TOOLS)
    shown = parser.add(f"<|tool_call|>[{ONE}]<|/tool_call|> <|tool_call|>[")
    calls = parser.calls
    parser.cut()
    shown += parser.add(f"{ONE}]<|/tool_call|>") + parser.finish()
    assert calls == parser.calls and len(calls) == 1 and shown.endswith(f"<|tool_call|>[{ONE}]<|/tool_call|>")
    assert parser.error == CUT


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["[", "1", "] ", "is", " it"], ["", "", "", "[1] is", " it"]),
        (['{"a"', ": ", "b", "}"], ["", "", '{"a": b', "}"]),
        (["``", "`py", "\n{"], ["", "```py", "\n{"]),
        (["```json", "\n[1]", "\n```", "\n", "x"], ["", "", "", "", "```json\n[1]\n```\nx"]),
    ],
)
def test_json_at_the_start_is_text_once_it_cannot_be_the_whole_answer(pieces: list[str], shown: list[str]) -> None:
    parser = ToolCallParser(TOOLS)
    assert [parser.add(piece) for piece in pieces] == shown
    assert parser.finish() == ""


def test_functions_are_tools() -> None:
    def now() -> str:
        return ""

    assert parsed(f"functools[{TWO}]", [now]) == Reply("", (NOW,), None)


@pytest.mark.parametrize("tools", ["now", {"name": "now"}, [5], [{}]])
def test_malformed_tools_are_refused(tools: Any) -> None:
    with pytest.raises(RequestError):
        parsed("", tools)


HOSTILE = {
    "markers": "<|tool_call|>", "open": "<|tool_call|>[", "functools": "functools[", "strings": '<|tool_call|>["',
    "halves": "<|", "blocks": "<|tool_call|>[{}]", "requests": "[TOOL_REQUEST]{", "unknown": 'functools[{"name": "x"}]',
}  # fmt: skip
ENDLESS = {
    "depth": ("<|tool_call|>", "["), "list": ("<|tool_call|>[", "[],"), "string": ('<|tool_call|>["', "<|tool_call|>["),
    "escapes": ('functools["', '\\"'), "number": ("functools[", "1"), "space": ("<|tool_call|>{}", " "),
    "start": ("", " "), "bare": ("[", "{},"), "fence": ("```json\n[]\n```", "\n"), "commas": ("<|tool_call|>{}", ",[]"),
}  # fmt: skip


def best_time(parse: Callable[[str, list[str]], Reply], text: str) -> float:
    """Seconds of processor time, the least of three runs."""
    times = []
    for _ in range(3):
        started = time.process_time()
        reply = parse(text, TOOLS)
        times.append(time.process_time() - started)
        assert reply.text == text and not reply.calls
    return min(times)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "unit"), [*(("", unit) for unit in HOSTILE.values()), *ENDLESS.values()])
def test_time_is_linear_in_the_answer(before: str, unit: str) -> None:
    """An answer eight times as long takes about eight times as long; quadratic time would make it 64."""
    for parse, size in ((parsed, 25_000), (parsed_pieces, 5_000)):
        short, long = (before + unit * (n // len(unit)) for n in (size, 8 * size))
        assert best_time(parse, long) < 24 * best_time(parse, short)

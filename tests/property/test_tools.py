"""Tool calls: 20,000 are written in all forms and parsed back exactly; 20,000 hostile answers give no call."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.json_text import json_text
from tests.tool_replies import Reply, parsed, parsed_pieces

ROUND_TRIPS = 20_000
HOSTILE = 20_000
NAMES = ["f", "get_weather", "a.b-c", "functools"]

# Parts of strings and answers that may mislead a parser.
FRAGMENTS = [
    "<|tool_call|>", "<|/tool_call|>", "<|tool_call|>[", "]<|/tool_call|>", "functools", "functools[", "functools[{",
    "[TOOL_REQUEST]", "[END_TOOL_REQUEST]", "[TOOL_", "<|", "|>", "<|end|>", "<|endoftext|>", "<|tool|>", "```json\n",
    "```", "[", "]", "{", "}", '"', "'", "\\", '\\"', "\\\\", "\\u0041", "\\ud83d", "\\x", ",", ":", ", ", "\n", "\r",
    "\t", " ", "\u2028", "\u2029", "\x85", "\xa0", "\x00", "\x1b", "\x7f", "\ufeff", "😀", "ß", "é", "漢",
    "true", "null", "NaN",
    "-", "1e5", "0", "12", ".5", "name", '"name"', '"name": "', '"arguments": {', "}}", "}]", "a",
    "Yes.",
]  # fmt: skip
# Whole values, calls of undeclared tools, and values that look like calls of a declared one.
DECOYS = [
    "[]", "{}", "[[]]", '""', "[1, 2]", '[{"name": "rm", "arguments": {}}]', '{"name": "rm", "arguments": {"a": "x]"}}',
    '{"name": 5, "arguments": {}}', '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": 5}',
    '{"name": "f", "arguments": {}, "type": "x"}', '{"name": "f", "parameters": {"a": {"type": "str"}}}',
    '{"name": "f", "description": "F", "parameters": {"type": "object", "properties": {}}}',
    '{"name": "F", "arguments": {}}', '{"arguments": {}}', '"{\\"name\\": \\"f\\"',
    '{"name": "f", "arguments": {"a": NaN}}',
    '{"name": "f", "arguments": "{"}', '{"name": "f", "arguments": {"a": "\\udc00"}}',
]  # fmt: skip


def text_of(draw: random.Random, most: int) -> str:
    return "".join(draw.choices(FRAGMENTS, k=draw.randint(0, most)))


def value_of(draw: random.Random, depth: int) -> Any:
    kind = draw.random()
    if depth and kind < 0.25:
        return [value_of(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    if depth and kind < 0.5:
        return {text_of(draw, 3): value_of(draw, depth - 1) for _ in range(draw.randint(0, 3))}
    if kind < 0.8:
        return text_of(draw, 6)
    numbers = [0, -1, 10**30, 0.1, -2.5e-8, 1e300, draw.random(), draw.getrandbits(200)]
    return draw.choice([None, True, False, *numbers])


def deep(draw: random.Random, depth: int = 50) -> Any:
    value = text_of(draw, 4)
    for _ in range(depth):
        value = [value] if draw.random() < 0.5 else {text_of(draw, 2): value}
    return value


def call_of(draw: random.Random) -> ToolCall:
    arguments = {text_of(draw, 3): value_of(draw, 3) for _ in range(draw.randint(0, 3))}
    return ToolCall(draw.choice(NAMES), arguments | ({"deep": deep(draw)} if draw.random() < 0.02 else {}))


def plain(call: ToolCall, key: str = "arguments") -> dict[str, Any]:
    return {"name": call.name, key: call.arguments}


def listed(items: list[Any]) -> str:
    return json_text(items)


# Number of a form -> writer of calls in that form.
FORMS: dict[str, Callable[[list[ToolCall]], str]] = {
    "1": lambda calls: f"<|tool_call|>{listed([plain(call) for call in calls])}<|/tool_call|>",
    "2": lambda calls: f"<|tool_call|>{listed([plain(call) for call in calls])}",
    "3": lambda calls: f"<|tool_call|>{json_text(plain(calls[0]))}<|/tool_call|>",
    "4": lambda calls: "\n".join(f"<|tool_call|>{json_text(plain(call))}<|/tool_call|>" for call in calls),
    "5": lambda calls: f"<|tool_call|>{', '.join(json_text(plain(call)) for call in calls)}<|/tool_call|>",
    "6": lambda calls: f"<|tool_call|>{listed([json_text(plain(call)) for call in calls])}<|/tool_call|>",
    "7": lambda calls: " \n".join(f"functools{listed([plain(call)])}" for call in calls),
    "8": lambda calls: f" {listed([plain(call) for call in calls])}\n",
    "9": lambda calls: f"```json\n{json.dumps([plain(call) for call in calls], indent=0)}\n```",
    "10": lambda calls: f"functools{listed([plain(call, 'parameters') for call in calls])}",
    "11": lambda calls: listed([{"name": call.name, "arguments": json_text(call.arguments)} for call in calls]),
    "12": lambda calls: listed([call.message(f"call_{at}") for at, call in enumerate(calls)]),
    "13": lambda calls: "".join(f"[TOOL_REQUEST]{json_text(plain(call))}[END_TOOL_REQUEST]\n" for call in calls),
}
SINGLE = ("3",)
WHOLE = ("8", "9", "11", "12")


def cut(draw: random.Random, text: str) -> list[str]:
    """A text in pieces, most of them a few characters long."""
    pieces, at = [], 0
    while at < len(text):
        size = draw.choice((1, 1, 2, 3, 5, 13, 80))
        pieces.append(text[at : at + size])
        at += size
    return pieces


def exact(calls: list[ToolCall] | tuple[ToolCall, ...]) -> list[str]:
    return [json_text(plain(call)) for call in calls]  # as text, because 1, 1.0 and True are equal


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_calls_written_in_a_form_are_parsed_back(form: str) -> None:
    draw = random.Random(f"round trips {form}")
    for n in range(ROUND_TRIPS // len(FORMS) + 1):
        calls = [call_of(draw) for _ in range(1 if form in SINGLE else draw.randint(1, 3))]
        before = "" if form in WHOLE else draw.choice(["", "", "Sure.\n", "A < b [c] {d} "])
        after = "" if form in WHOLE else draw.choice(["", "", "\n", "Done."])
        text = before + FORMS[form](calls) + after
        reply = parsed(text, NAMES)
        assert exact(reply.calls) == exact(calls), text
        assert (reply.text, reply.error) == (before + after.strip(), None), text
        assert parsed_pieces(cut(draw, text), NAMES) == reply
        if n % 20 == 0:
            assert parsed_pieces(text, NAMES) == reply


@pytest.mark.parametrize("form", FORMS)
def test_nested_arguments_are_parsed_from_two_pieces_split_anywhere(form: str) -> None:
    draw = random.Random(f"deep {form}")
    calls = [ToolCall("f", {"deep": deep(draw), "x": "]}"}) for _ in range(1 if form in SINGLE else 2)]
    text = FORMS[form](calls)
    expected = Reply("", tuple(calls), None)
    assert parsed(text, NAMES) == expected
    assert parsed_pieces(text, NAMES) == expected
    for at in range(len(text)):
        assert parsed_pieces([text[:at], text[at:]], NAMES) == expected, text[:at]


def test_hostile_answers_stay_text_to_the_last_character() -> None:
    draw = random.Random("hostile")
    for _ in range(HOSTILE):
        text = "".join(draw.choices(FRAGMENTS + DECOYS * 2, k=draw.randint(1, 14)))
        reply = parsed(text, NAMES)
        assert reply.calls == () and reply.text == text, text
        assert reply.error is None or (reply.error.isprintable() and len(reply.error) < 600), reply.error
        assert parsed_pieces(cut(draw, text), NAMES) == reply, text


def test_bare_and_fenced_calls_within_other_text_stay_text() -> None:
    draw = random.Random("within text")
    harmless = [part for part in FRAGMENTS if part.strip() and not any(sign in part for sign in '<[{`"f\\,')]
    for _ in range(2_000):
        call = FORMS[draw.choice(WHOLE)]([call_of(draw)])
        word = draw.choice(harmless)
        text = draw.choice([f"{word} {call}", f"{call} {word}"])
        if "<|tool_call|>" in text or "functools" in text or "[TOOL_REQUEST]" in text:
            continue  # a marker inside a string of the call may start another call
        assert parsed(text, NAMES) == Reply(text, (), None), text


def test_calls_parsed_from_hostile_text_name_declared_tools() -> None:
    draw = random.Random("mixed")
    found = 0
    for _ in range(5_000):
        parts = draw.choices(FRAGMENTS, k=draw.randint(0, 8))
        parts.insert(draw.randint(0, len(parts)), FORMS[draw.choice(list(FORMS))]([call_of(draw)]))
        text = "".join(parts)
        reply = parsed(text, NAMES)
        assert parsed_pieces(cut(draw, text), NAMES) == reply, text
        assert {call.name for call in reply.calls} <= set(NAMES)
        assert reply.calls or reply.text == text
        rest = iter(text)
        assert all(char in rest for char in reply.text), text  # a subsequence of the answer
        found += len(reply.calls)
    assert 1_000 < found < 5_000

"""Answers that max_tokens cuts or forces to an end: no API says that they are whole, and no cut call is offered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.server.in_process import InProcessServer, events_of

FORM = {
    "type": "object",
    "properties": {"who": {"type": "string", "maxLength": 6}, "n": {"type": "integer", "minimum": 0, "maximum": 9_999}},
    "required": ["who", "n"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "hi"}]
FUNCTION = {"name": "book", "description": "Books.", "parameters": FORM}
LIMITS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
}
WHOLE = ("stop", "tool_calls", "end_turn", "tool_use", "stop_sequence", "completed")
CUT = ("length", "max_tokens", "incomplete")


def body(path: str, kind: str, **more: Any) -> dict[str, Any]:
    """A request for JSON or for a call, of an API."""
    given: dict[str, Any] = {"model": "tiny", **more}
    schema = {"type": "json_schema", "name": "form", "schema": FORM}
    if path == "/v1/completions":
        return given | {"prompt": "hi", "response_format": {"type": "json_schema", "json_schema": schema}}
    if path == "/v1/chat/completions":
        given["messages"] = ASK
        if kind == "json":
            return given | {"response_format": {"type": "json_schema", "json_schema": schema}}
        return given | {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"}
    if path == "/v1/responses":
        given["input"] = ASK
        if kind == "json":
            return given | {"text": {"format": schema}}
        return given | {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"}
    given["messages"] = ASK
    if kind == "json":
        return given | {"output_config": {"format": schema}}
    tool = {"name": "book", "description": "Books.", "input_schema": FORM}
    return given | {"tools": [tool], "tool_choice": {"type": "any"}}


def told(path: str, answer: dict[str, Any]) -> tuple[str, str, list[Any]]:
    """(reason, text, calls as names and arguments) of a body."""
    if path == "/v1/messages":
        blocks = answer["content"]
        text = "".join(each["text"] for each in blocks if each["type"] == "text")
        calls = [(each["name"], each["input"]) for each in blocks if each["type"] == "tool_use"]
        return answer["stop_reason"], text, calls
    if path == "/v1/responses":
        texts = [each["content"][0]["text"] for each in answer["output"] if each["type"] == "message"]
        made = [each for each in answer["output"] if each["type"] == "function_call"]
        if answer["status"] == "incomplete":
            assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
        return answer["status"], "".join(texts), [(each["name"], json.loads(each["arguments"])) for each in made]
    choice = answer["choices"][0]
    message = choice.get("message") or {"content": choice["text"]}
    made = [each["function"] for each in message.get("tool_calls", [])]
    calls = [(each["name"], json.loads(each["arguments"])) for each in made]
    return choice["finish_reason"], message["content"] or "", calls


def streamed(path: str, events: list[dict[str, Any]]) -> tuple[str, str, list[Any]]:
    """The same of a stream."""
    if path == "/v1/responses":
        return told(path, events[-1]["response"])
    if path == "/v1/messages":
        text = "".join(each["delta"].get("text", "") for each in events if each["type"] == "content_block_delta")
        starts = [each["content_block"] for each in events if each["type"] == "content_block_start"]
        names = [each["name"] for each in starts if each["type"] == "tool_use"]
        deltas = [each["delta"] for each in events if each["type"] == "content_block_delta"]
        made = [json.loads(each["partial_json"]) for each in deltas if "partial_json" in each]
        reason = next(each["delta"]["stop_reason"] for each in events if each["type"] == "message_delta")
        return reason, text, list(zip(names, made, strict=True))
    choices = [each["choices"][0] for each in events]
    text = "".join(each.get("text") or each.get("delta", {}).get("content") or "" for each in choices)
    made = [call["function"] for each in choices for call in each.get("delta", {}).get("tool_calls", [])]
    return choices[-1]["finish_reason"], text, [(each["name"], json.loads(each["arguments"])) for each in made]


@pytest.mark.slow
@pytest.mark.parametrize("path", LIMITS)
@pytest.mark.parametrize("kind", ["json", "call"])
@pytest.mark.parametrize("seed", [3, 4])
def test_a_cut_answer_is_never_told_as_whole(server: InProcessServer, path: str, kind: str, seed: int) -> None:
    if (path, kind) == ("/v1/completions", "call"):
        pytest.skip("completions have no tools")
    asked = body(path, kind, seed=seed)
    whole = told(path, server.post(path, asked | {LIMITS[path]: 8_000}).json())
    assert whole[0] in WHOLE and bool(whole[2]) == (kind == "call")
    reasons = set()
    for limit in range(1, 200):
        given = asked | {LIMITS[path]: limit}
        reason, text, calls = told(path, server.post(path, given).json())
        assert (reason, text, calls) == streamed(path, events_of(server.post(path, given | {"stream": True})))
        reasons.add(reason)
        if reason in WHOLE:
            assert (reason, text, calls) == whole
            break
        assert reason in CUT and calls in ([], whole[2])
        if not calls and kind == "json" and text.endswith("}"):
            json.loads(text)
    assert len(reasons) == 2, reasons  # it was cut, and in the end it was whole


@pytest.mark.parametrize("path", [path for path in LIMITS if path != "/v1/completions"])
def test_a_stop_string_inside_a_call_leaves_no_call(server: InProcessServer, path: str) -> None:
    asked = body(path, "call", seed=3) | {"stop_sequences" if path == "/v1/messages" else "stop": ['"arguments']}
    reason, text, calls = told(path, server.post(path, asked | {LIMITS[path]: 100}).json())
    assert reason in WHOLE and reason not in ("tool_calls", "tool_use")
    assert calls == [] and text.startswith("<|tool_call|>[{")

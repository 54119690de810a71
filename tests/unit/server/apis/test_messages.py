"""/v1/messages: parsed bodies, and answers that Anthropic's client reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from phi4_mlx.server.apis.messages import MessageAnswer, error_body, parse
from phi4_mlx.server.apis.wire import Delta, End, WireError
from phi4_mlx.tokens.messages import check_messages
from tests.unit.server.apis.harness import (
    CALLS,
    HI,
    KÖLN,
    NOW,
    SCHEMA,
    TEXT,
    THOUGHTS,
    V,
    counted_ids,
    named_events,
    refused,
    served,
    stream,
)
from tests.unit.server.clients import claude_code

TOOL = {"name": "weather", "description": "Tells", "input_schema": SCHEMA}


def ask(**more: Any) -> Any:
    return parse({"model": "phi", "messages": HI, "max_tokens": 5, **more}, V)


def make_answer(asked: Any) -> MessageAnswer:
    return MessageAnswer(asked, NOW, 10, counted_ids())


def client(items: Sequence[Delta | End], error: WireError | None = None) -> Any:
    """The official client."""
    anthropic = pytest.importorskip("anthropic")
    http = served(lambda body: make_answer(parse(body, V)), items, error, error_body)
    return anthropic.Anthropic(api_key="k", base_url="http://localhost", http_client=http, max_retries=0)


@pytest.fixture
def known() -> Callable[[Any], None]:
    """Checks events against the official client's types."""
    types, pydantic = pytest.importorskip("anthropic.types"), pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(types.RawMessageStreamEvent)

    def check(events: Any) -> None:
        for event in events:
            if event["type"] != "ping":
                assert adapter.validate_python(event).type == event["type"]

    return check


def test_a_plain_body() -> None:
    plain = ask()
    assert plain.messages == HI and plain.max_tokens == 5 and plain.sampling.temp == 1.0
    assert plain.tools == [] and plain.tool_choice == "none" and plain.stop == () and plain.parallel_tool_calls


def test_a_full_body_is_read() -> None:
    full = ask(
        system=[{"type": "text", "text": "be "}, {"type": "text", "text": "kind", "cache_control": {}}], tools=[TOOL],
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True}, stop_sequences=["a", "b"],
        temperature=0.5, top_p=0.9, top_k=40, stream=True, metadata={"user_id": "me"}, service_tier="auto",
        thinking={"type": "disabled"},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
    )  # fmt: skip
    assert full.messages == [{"role": "system", "content": "be kind"}, *HI]
    assert full.tools == [
        {"type": "function", "function": {"name": "weather", "description": "Tells", "parameters": SCHEMA}}
    ]
    assert full.tool_choice == "weather" and not full.parallel_tool_calls and full.stop == ("a", "b")
    assert (full.sampling.temp, full.sampling.top_p, full.sampling.top_k) == (0.5, 0.9, 40)
    assert full.stream and full.response_format == ("json_schema", SCHEMA)


@pytest.mark.parametrize(("kind", "choice"), [("auto", "auto"), ("any", "required"), ("none", "none")])
def test_tool_choice(kind: str, choice: str) -> None:
    assert ask(tools=[TOOL], tool_choice={"type": kind}).tool_choice == choice


def test_max_tokens_may_be_absent() -> None:
    assert parse({"messages": HI}, V).max_tokens is None


def test_a_conversation_with_calls_is_valid_for_the_model() -> None:
    def use(name: str, city: str) -> Any:
        return {"type": "tool_use", "id": name, "name": "weather", "input": {"city": city}}

    def result(name: str, **more: Any) -> Any:
        return {"type": "tool_result", "tool_use_id": name, **more}

    given = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "\x00"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "So."}, use("1", "Köln"),
            use("2", "Rom"),
        ]},
        {"role": "user", "content": [
            result("2", content=[{"type": "text", "text": "none"}], is_error=True), result("1", content="sun"),
            {"type": "text", "text": "and?"},
        ]},
        {"role": "assistant", "content": [use("3", "Ulm")]},
        {"role": "user", "content": [result("3")]},
    ]  # fmt: skip
    checked = check_messages(ask(messages=given, system="be kind").messages)
    assert [(it["role"], it["content"]) for it in checked] == [
        ("system", "be kind"), ("user", "a\x00"), ("assistant", "So."), ("tool", "sun"), ("tool", "Error: none"),
        ("user", "and?"), ("assistant", ""), ("tool", ""),
    ]  # fmt: skip
    assert [it["arguments"] for it in checked[2]["tool_calls"]] == [{"city": "Köln"}, {"city": "Rom"}]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("messages", None),
        ("messages", []),
        ("messages", ["hi"]),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("messages", [{"role": "user", "content": [{"type": "image", "source": {}}]}]),
        ("messages", [{"role": "user", "content": [{"type": "document", "source": {}}]}]),
        ("messages", [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]),
        ("messages", [*HI, {"role": "assistant", "content": "Let me"}]),
        ("system", 5),
        ("tools", [{"name": "f", "input_schema": []}]),
        ("tool_choice", "auto"),
        ("tool_choice", {"type": "any"}),
        ("tool_choice", {"type": "tool"}),
        ("output_config", {"format": {"type": "xml"}}),
    ],
)
def test_a_body_that_cannot_be_served_is_refused(name: str, value: Any) -> None:
    assert (refused(lambda: ask(**{name: value})).param or "").startswith(name)


def test_tools_that_another_server_ran_are_text() -> None:
    body = claude_code()
    messages = check_messages(parse(body, V).messages)
    said = messages[2]
    assert said["content"] == 'I will look.\nweb_search {"query": "a.txt"}\nA\nhttps://a.example\n'
    assert [call["arguments"] for call in said["tool_calls"]] == [{"path": "a.txt"}, {}]
    assert [it["content"] for it in messages[3:]] == [
        "oneBash[image left out: this model reads only text]",
        "Error: no path",
        "<system-reminder>Be brief.</system-reminder>",
    ]


def test_strict_demands_a_tools_schema() -> None:
    asked = ask(tools=[{**TOOL, "strict": True}], output_format={"type": "json_schema", "schema": SCHEMA})
    assert asked.tools[0]["function"]["strict"] is True
    assert asked.response_format == ("json_schema", SCHEMA) and not asked.strict


def test_an_image_is_refused_with_its_field() -> None:
    with pytest.raises(WireError, match=r"messages\[0\]\.content\[0\]\.type is 'image'; this model reads only text"):
        ask(messages=[{"role": "user", "content": [{"type": "image", "source": {}}]}])


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (501, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_errors_have_anthropics_shape(status: int, kind: str) -> None:
    assert error_body(WireError(status, "no")) == {"type": "error", "error": {"type": kind, "message": "no"}}


def test_a_whole_answer() -> None:
    assert make_answer(ask()).body(TEXT) == {
        "id": "msg_0",
        "type": "message",
        "role": "assistant",
        "model": "phi",
        "content": [{"type": "text", "text": "Grüße"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 6,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 3,
        },
    }


@pytest.mark.parametrize(
    ("end", "reason", "string"),
    [
        (End(0, "stop"), "end_turn", None),
        (End(0, "stop", "###"), "stop_sequence", "###"),
        (End(0, "length"), "max_tokens", None),
        (End(0, "timeout"), "max_tokens", None),
        (End(0, "tool_calls"), "tool_use", None),
        (End(0, "tool_calls", "###"), "tool_use", None),
    ],
)
def test_reasons_in_anthropics_words(end: End, reason: str, string: str | None) -> None:
    body = make_answer(ask()).body([Delta(text="a"), end])
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, string)
    events = named_events(stream(make_answer(ask()), [Delta(text="a"), end]))
    assert events[-2]["delta"] == {"stop_reason": reason, "stop_sequence": string}


def test_a_stream_has_the_same_blocks(known: Any) -> None:
    events = named_events(stream(make_answer(ask()), CALLS))
    known(events)
    assert [(it["type"], it.get("index")) for it in events] == [
        ("message_start", None), ("ping", None),
        ("content_block_start", 0), ("content_block_delta", 0), ("content_block_delta", 0), ("content_block_stop", 0),
        ("content_block_start", 1), ("content_block_delta", 1), ("content_block_stop", 1),
        ("content_block_start", 2), ("content_block_delta", 2), ("content_block_stop", 2),
        ("message_delta", None), ("message_stop", None),
    ]  # fmt: skip
    assert events[0]["message"]["usage"]["input_tokens"] == 10 and events[0]["message"]["content"] == []
    assert events[2]["content_block"] == {"type": "text", "text": ""}
    assert events[6]["content_block"]["input"] == {} and json.loads(events[7]["delta"]["partial_json"]) == {
        "city": "Köln"
    }
    whole = make_answer(ask()).body(CALLS)
    assert [it["type"] for it in whole["content"]] == ["text", "tool_use", "text"]
    assert events[-2]["usage"] == whole["usage"]


def test_an_empty_answer_is_an_empty_block(known: Any) -> None:
    events = named_events(stream(make_answer(ask()), [End(0)]))
    known(events)
    assert make_answer(ask()).body([End(0)])["content"] == [{"type": "text", "text": ""}]


def test_the_client_reads_a_whole_answer_and_sends_it_back() -> None:
    items = [Delta(text="So."), Delta(call=KÖLN), End(0, "tool_calls")]
    done = client(items).messages.create(model="phi", max_tokens=5, messages=HI, tools=[TOOL])
    type(done).model_validate(done.model_dump())
    assert done.content[0].text == "So." and done.content[1].input == {"city": "Köln"}
    result = {"type": "tool_result", "tool_use_id": done.content[1].id, "content": "sun"}
    history = [*HI, {"role": "assistant", "content": done.content}, {"role": "user", "content": [result]}]
    assert client(TEXT).messages.create(model="phi", max_tokens=5, messages=history).content[0].text == "Grüße"


def test_the_client_reads_a_stream() -> None:
    items = [Delta(text="So."), Delta(call=KÖLN), End(0, "tool_calls", None, 10, 4, 5)]
    with client(items).messages.stream(model="phi", max_tokens=5, messages=HI, tools=[TOOL]) as told:
        final = told.get_final_message()
    assert final.content[0].text == "So." and final.content[1].input == {"city": "Köln"}
    assert final.stop_reason == "tool_use" and final.usage.output_tokens == 5 and final.usage.input_tokens == 6
    with client(TEXT).messages.stream(model="phi", max_tokens=5, messages=HI) as told:
        assert "".join(told.text_stream) == "Grüße"


def test_the_client_raises_refusals_and_failures() -> None:
    anthropic = pytest.importorskip("anthropic")
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client(TEXT).messages.create(model="phi", max_tokens=5, messages=HI, extra_body={"temperature": "hot"})
    told = client(TEXT, WireError(500, "it broke")).messages.create(model="phi", max_tokens=5, messages=HI, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="it broke"):
        list(told)


@pytest.mark.parametrize("items", [THOUGHTS, [THOUGHTS[0], Delta(call=KÖLN), CALLS[-1]], [THOUGHTS[0], THOUGHTS[-1]]])
def test_thoughts_are_a_block_before_the_text(items: list[Delta | End], known: Callable[[Any], None]) -> None:
    asked = ask(stream=True)
    known(named_events(stream(make_answer(asked), items)))
    whole = make_answer(ask()).body(items)
    first, *others = whole["content"]
    thought = "Let me see." if items == THOUGHTS else "Let me "
    assert first == {"type": "thinking", "thinking": thought, "signature": ""}
    assert [block["type"] for block in others] == ["tool_use" if items[1] == Delta(call=KÖLN) else "text"]
    with client(items).messages.stream(model="phi", max_tokens=9, messages=HI) as streamed:
        assert streamed.get_final_message().content[0].thinking == thought

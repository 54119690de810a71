"""/v1/responses: parsed bodies, and answers that the official client reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.server.apis.responses import ResponseAnswer, parse
from phi4_mlx.server.apis.wire import Delta, End, WireError
from phi4_mlx.server.engine.protocol import TokenLogprob
from phi4_mlx.tokens.messages import check_messages
from tests.unit.server.apis.harness import (
    CALLS,
    KÖLN,
    NOW,
    SCHEMA,
    TEXT,
    THOUGHTS,
    V,
    counted_ids,
    named_events,
    openai_client,
    refused,
    stream,
)
from tests.unit.server.clients import codex

TOOL = {"type": "function", "name": "weather", "description": "Tells", "parameters": SCHEMA}
CALL = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Köln"}'}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "sun"}


def ask(given: Any = "hi", **more: Any) -> Any:
    return parse({"model": "phi", "input": given, **more}, V)


def make_answer(asked: Any) -> ResponseAnswer:
    return ResponseAnswer(asked, NOW, 10, counted_ids())


def client(items: Sequence[Delta | End]) -> Any:
    return openai_client(lambda body: make_answer(parse(body, V)), items)


def events_of(data: bytes) -> list[JsonObject]:
    events = named_events(data)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


@pytest.fixture
def known() -> Callable[[Any], None]:
    """Checks events against the official client's types."""
    types = pytest.importorskip("openai.types.responses")
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(types.ResponseStreamEvent)

    def check(events: Any) -> None:
        for event in events:
            assert adapter.validate_python(event).type == event["type"]
            if "response" in event:
                types.Response.model_validate(event["response"])

    return check


def test_a_plain_body() -> None:
    plain = ask()
    assert plain.messages == [{"role": "user", "content": "hi"}]
    assert plain.max_tokens is None and plain.sampling.temp == 1.0 and plain.top_logprobs is None


def test_a_full_body_is_read() -> None:
    full = ask(
        [{"role": "user", "content": "hi"}], instructions="be kind", tools=[TOOL], parallel_tool_calls=False,
        tool_choice={"type": "function", "name": "weather"}, max_output_tokens=5, stream=True, top_logprobs=2,
        text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}},
        include=["message.output_text.logprobs", "reasoning.encrypted_content"], store=True, metadata={"a": "b"},
        reasoning={"effort": "low"}, truncation="disabled", temperature=0,
    )  # fmt: skip
    assert full.messages == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert full.tools[0]["function"] == {key: value for key, value in TOOL.items() if key != "type"}
    assert full.tool_choice == "weather" and not full.parallel_tool_calls and full.max_tokens == 5 and full.stream
    assert full.response_format == ("json_schema", SCHEMA) and full.top_logprobs == 2 and full.sampling.temp == 0
    assert full.repeated["instructions"] == "be kind" and full.repeated["metadata"] == {"a": "b"}


def test_logprobs_are_asked_for_in_two_ways() -> None:
    assert ask(include=["message.output_text.logprobs"]).top_logprobs == 0
    assert ask(top_logprobs=3).top_logprobs == 3
    assert ask(top_logprobs=0).top_logprobs is None


def test_a_conversation_with_calls_is_valid_for_the_model() -> None:
    said = {"type": "output_text", "text": "Let me see.", "annotations": []}
    items = [
        {"role": "developer", "content": "be kind"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [said]},
        {**CALL, "id": "fc_1"},
        {**CALL, "call_id": "call_2", "arguments": ""},
        {**OUTPUT, "call_id": "call_2", "output": [{"type": "input_text", "text": "rain"}]},
        OUTPUT,
        CALL,
        OUTPUT,
    ]
    checked = check_messages(ask(items, instructions="Phi").messages)
    assert [(it["role"], it["content"]) for it in checked] == [
        ("system", "Phi"), ("system", "be kind"), ("user", "weather?"), ("assistant", "Let me see."),
        ("tool", "sun"), ("tool", "rain"), ("assistant", ""), ("tool", "sun"),
    ]  # fmt: skip
    assert checked[3]["tool_calls"] == [
        {"name": "weather", "arguments": {"city": "Köln"}}, {"name": "weather", "arguments": {}}
    ]  # fmt: skip
    assert len(checked[6]["tool_calls"]) == 1


def test_calls_and_results_of_other_kinds_are_calls_and_results() -> None:
    body = codex()
    messages = check_messages(parse(body, V).messages)
    assert [it["role"] for it in messages] == [
        "system", "system", "user", "assistant", "tool", "assistant", "tool", "assistant", "tool", "assistant", "user",
    ]  # fmt: skip
    assert [it["tool_calls"][0] for it in messages if it.get("tool_calls")] == [
        {"name": "local_shell", "arguments": {"type": "exec", "command": ["ls"]}},
        {"name": "apply_patch", "arguments": {"input": "*** Begin Patch"}},
        {"name": "shell", "arguments": '{"command": ["py'},
    ]
    assert [it["content"] for it in messages if it["role"] == "tool"] == ["a.py", "Done", "not JSON"]
    ignored = set(parse(body, V).ignored)
    assert {*(f"tools[{n}]" for n in range(1, 5)), "input[2]", "input[7]", "include", "text.verbosity"} <= ignored
    assert not {"tools", "tools[0]", "input[3]", "tool_choice", "store", "parallel_tool_calls"} & ignored


def test_only_strict_true_demands_a_schema() -> None:
    for strict in (True, False, None, "yes"):
        form = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": strict}
        asked = ask(text={"format": form}, tools=[{**TOOL, "strict": strict}])
        assert asked.strict == (strict is True) and asked.tools[0]["function"].get("strict") == (
            strict if isinstance(strict, bool) else None
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("prompt", {"id": "pmpt_1"}),
        ("background", True),
        ("tool_choice", {"type": "function"}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("text", {"format": {"type": "json_schema", "name": "x"}}),
        ("text", 5),
        ("top_logprobs", 21),
        ("instructions", ["x"]),
        ("input", None),
        ("input", []),
        ("input", 5),
        ("input", ["hi"]),
        ("input", [{"type": "reasoning"}]),
        ("input", [{"type": "item_reference", "id": "msg_1"}]),
        ("input", [{"role": "tool", "content": "x"}]),
        ("input", [{"role": "user"}]),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
    ],
)
def test_a_body_that_cannot_be_served_is_refused(name: str, value: Any) -> None:
    error = refused(lambda: parse({"model": "phi", "input": "hi", name: value}, V))
    assert (error.param or "").startswith(name)


def test_a_whole_answer(known: Any) -> None:
    body = make_answer(ask(instructions="be kind", tools=[TOOL])).body(TEXT)
    assert body["id"] == "resp_0" and body["status"] == "completed" and body["created_at"] == NOW
    assert body["instructions"] == "be kind" and body["tools"][0]["name"] == "weather"
    part = {"type": "output_text", "text": "Grüße", "annotations": [], "logprobs": []}
    assert body["output"] == [
        {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    ]
    assert body["usage"]["input_tokens_details"]["cached_tokens"] == 4 and body["usage"]["total_tokens"] == 13
    known([{"type": "response.completed", "sequence_number": 0, "response": body}])


def test_a_stream_ends_with_the_complete_response(known: Any) -> None:
    events = events_of(stream(make_answer(ask(tools=[TOOL])), CALLS))
    known(events)
    assert [it["type"].removeprefix("response.") for it in events] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [it["output_index"] for it in events if it["type"] == "response.output_item.done"] == [0, 1, 2]
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"
    assert events[2]["item"]["content"] == [] and events[9]["item"]["arguments"] == ""
    final = events[-1]["response"]
    assert final["output"] == [it["item"] for it in events if it["type"] == "response.output_item.done"]
    assert final == make_answer(ask(tools=[TOOL])).body(CALLS)


@pytest.mark.parametrize("reason", ["length", "timeout"])
def test_a_truncated_answer_is_incomplete(reason: Any, known: Any) -> None:
    events = events_of(stream(make_answer(ask()), [Delta(text="a"), End(0, reason)]))
    known(events)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"


def test_an_empty_answer_is_an_empty_message(known: Any) -> None:
    events = events_of(stream(make_answer(ask()), [End(0)]))
    known(events)
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_logprobs_wait_for_their_text(known: Any) -> None:
    first, second, last = (TokenLogprob(text, -0.5, ((text, -0.5),)) for text in (b"\xc3", b"\xa9", b""))
    items = [Delta(logprobs=(first,)), Delta(text="é", logprobs=(second,)), Delta(logprobs=(last,)), End(0)]
    events = events_of(stream(make_answer(ask(top_logprobs=1)), items))
    known(events)
    deltas = [it for it in events if it["type"] == "response.output_text.delta"]
    assert [len(it["logprobs"]) for it in deltas] == [2]
    assert len(events[-1]["response"]["output"][0]["content"][0]["logprobs"]) == 3
    assert make_answer(ask()).body(items)["output"][0]["content"][0]["logprobs"] == []


def test_a_stream_that_fails_ends_with_a_failed_response(known: Any) -> None:
    answer = make_answer(ask())
    events = events_of(answer.opening() + answer.chunk(Delta(text="a")) + answer.failure(WireError(500, "it broke")))
    known(events)
    assert [it["type"] for it in events[-2:]] == ["error", "response.failed"]
    assert events[-2]["message"] == events[-1]["response"]["error"]["message"] == "it broke"
    assert events[-1]["response"]["status"] == "failed"


def test_the_client_reads_answers_and_refusals() -> None:
    openai = pytest.importorskip("openai")
    done = client(TEXT).responses.create(model="phi", input="hi")
    assert done.output_text == "Grüße" and done.usage.output_tokens == 3
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client(TEXT).responses.create(model="phi", input="hi", previous_response_id="resp_1")


def test_the_client_reads_a_stream_and_sends_it_back() -> None:
    items = [Delta(text="So."), Delta(call=KÖLN), End(0, "tool_calls")]
    with client(items).responses.stream(model="phi", input="hi", tools=[TOOL]) as told:
        types = {it.type for it in told}
        final = told.get_final_response()
    assert {"response.output_text.delta", "response.function_call_arguments.delta"} <= types
    assert final.output_text == "So." and final.output[1].call_id == "call_1"
    history = [{"role": "user", "content": "hi"}, *final.output, OUTPUT]
    assert client(TEXT).responses.create(model="phi", input=history).output_text == "Grüße"


@pytest.mark.parametrize("items", [THOUGHTS, [THOUGHTS[0], Delta(call=KÖLN), CALLS[-1]], [THOUGHTS[0], THOUGHTS[-1]]])
def test_thoughts_are_an_item_before_the_text(items: list[Delta | End], known: Callable[[Any], None]) -> None:
    known(events_of(stream(make_answer(ask(stream=True)), items)))
    first, *others = make_answer(ask()).body(items)["output"]
    thought = "Let me see." if items == THOUGHTS else "Let me "
    assert (first["type"], first["summary"]) == ("reasoning", [])
    assert first["content"] == [{"type": "reasoning_text", "text": thought}]
    assert [item["type"] for item in others] == ["function_call" if items[1] == Delta(call=KÖLN) else "message"]
    told = client(items).responses.create(model="phi", input="hi")
    assert told.output[0].content[0].text == thought

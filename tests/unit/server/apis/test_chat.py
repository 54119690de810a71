"""/v1/chat/completions: parsed bodies, and answers that the official client reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.apis.chat import ChatAnswer, parse
from phi4_mlx.server.apis.wire import Delta, End, WireError
from phi4_mlx.server.engine.protocol import TokenLogprob
from phi4_mlx.tokens.messages import check_messages
from tests.unit.server.apis.harness import (
    HI,
    KÖLN,
    NOW,
    ROM,
    SCHEMA,
    THOUGHTS,
    V,
    chunks,
    counted_ids,
    openai_client,
    refused,
    stream,
)

TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells", "parameters": SCHEMA}}
LOGPROBS = (TokenLogprob(b"\xc3", -0.5, ((b"\xc3", -0.5), (b"x", -1.0))), TokenLogprob(b"\xa9", -0.25))
LINES = [Delta(text="Gr"), Delta(), Delta(text="üße\u2028😀"), End(0, "stop", None, 10, 4, 3)]


def ask(**more: Any) -> Any:
    return parse({"model": "phi", "messages": HI, **more}, V)


def make_answer(body: JsonObject) -> ChatAnswer:
    return ChatAnswer(parse(body, V), NOW, 10, counted_ids())


def answer(**more: Any) -> ChatAnswer:
    return make_answer({"model": "phi", "messages": HI, **more})


def client(items: Sequence[Delta | End], error: WireError | None = None) -> Any:
    return openai_client(make_answer, items, error)


def test_a_plain_body_has_openais_defaults() -> None:
    plain = ask()
    assert plain.model == "phi" and plain.messages == HI
    assert plain.sampling.temp == 1.0 and plain.max_tokens is None and plain.n == 1
    assert plain.tools == [] and plain.tool_choice == "none" and plain.response_format is None
    assert not plain.stream and not plain.include_usage and plain.top_logprobs is None


def test_a_full_body_is_read() -> None:
    full = ask(
        tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}}, parallel_tool_calls=False,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, temperature=0.5,
        max_tokens=7, max_completion_tokens=9, stop=["a", "b"], n=2, stream=True, logprobs=True, top_logprobs=3,
        stream_options={"include_usage": True}, seed=-1, user="me", store=True, metadata={"a": "b"}, whatever=[1],
    )  # fmt: skip
    assert full.tools == [TOOL] and full.tool_choice == "weather" and not full.parallel_tool_calls
    assert full.response_format == ("json_schema", SCHEMA)
    assert full.sampling.temp == 0.5 and full.sampling.seed == 2**64 - 1
    assert full.max_tokens == 9 and full.stop == ("a", "b") and full.n == 2
    assert full.stream and full.include_usage and full.top_logprobs == 3


def test_max_tokens_may_be_null() -> None:
    assert ask(max_tokens=None).max_tokens is None
    assert ask(max_tokens=7).max_tokens == 7


def test_logprobs_without_a_number_are_the_tokens_own() -> None:
    assert ask(logprobs=True).top_logprobs == 0
    assert ask(logprobs=False, top_logprobs=0).top_logprobs is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("messages", []),
        ("messages", None),
        ("messages", "hi"),
        ("messages", HI * 10_001),
        ("n", 9),
        ("n", 0),
        ("n", 10**12),
        ("logprobs", 5),
        ("logprobs", "true"),
        ("top_logprobs", 21),
        ("tools", [{"type": "function"}]),
        ("tools", [{"type": "function", "function": {"description": "nameless"}}]),
        ("tools", TOOL),
        ("tool_choice", "required"),  # without tools
        ("tool_choice", "weather"),
        ("function_call", {"name": "weather"}),
        ("tool_choice", {"type": "function", "function": {"name": "weather"}}),
        ("stream", "yes"),
        ("stream_options", []),
        ("response_format", {"type": "json_schema"}),
    ],
)
def test_a_body_that_cannot_be_served_is_refused(name: str, value: Any) -> None:
    error = refused(lambda: ask(**{name: value}))
    assert name in error.message and (error.param or "").startswith(name)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "robot", "content": "hi"},
        {"role": ["user"], "content": "hi"},
        {"role": "user", "content": 5},
        {"role": "user", "content": "\ud800"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        {"role": "assistant", "tool_calls": [{}]},
        "hi",
        None,
    ],
)
def test_a_message_that_cannot_be_read_is_refused(message: Any) -> None:
    error = refused(lambda: ask(messages=[*HI, message]))
    assert "messages[1]" in error.message or "surrogate" in error.message


def test_older_forms_of_calls_are_calls() -> None:
    history = [
        *HI,
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "g", "input": "x"}}]},
        {"role": "tool", "tool_call_id": 5, "content": {"a": 1}},
        *HI,
    ]
    messages = check_messages(ask(messages=history).messages)
    assert [it.get("tool_calls") for it in messages][1::2] == [
        [{"name": "f", "arguments": {"a": 1}}], [{"name": "g", "arguments": {"input": "x"}}], None,
    ]  # fmt: skip
    assert [it["content"] for it in messages if it["role"] == "tool"] == ["1", '{"a": 1}']


def test_a_schema_beside_json_object_is_kept() -> None:
    assert ask(response_format={"type": "json_object", "schema": SCHEMA}).response_format == ("json_schema", SCHEMA)
    assert ask(response_format={"type": "json_object", "schema": None}).response_format == ("json_object",)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    assert ask(response_format=form).strict and ask(response_format=form).ignored == ()


def test_an_assistants_refusal_is_its_content() -> None:
    said = {"role": "assistant", "content": None, "refusal": "No."}
    assert ask(messages=[*HI, said]).messages[1] == {"role": "assistant", "content": "No."}
    refused(lambda: ask(messages=[{"role": "user", "content": None, "refusal": "No."}]))


def test_an_image_is_refused_with_its_field() -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}}
    error = refused(lambda: ask(messages=[{"role": "user", "content": [image]}]))
    assert error.message == "messages[0].content[0].type is 'image_url'; this model reads only text"


def test_a_conversation_with_calls_is_valid_for_the_model() -> None:
    calls = [
        {"id": it.id, "type": "function", "function": {"name": it.name, "arguments": it.text}} for it in (KÖLN, ROM)
    ]
    told = [
        {"role": "tool", "tool_call_id": it, "content": [{"type": "text", "text": it}]} for it in ("call_2", "call_1")
    ]
    given = [
        {"role": "developer", "content": "be kind", "tools": "<|tool|>smuggled"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "\x00"}], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None, "annotations": []},
        *told,
        {"role": "assistant", "content": "done"},
    ]
    messages = parse({"model": "phi", "messages": given}, V).messages
    checked = check_messages(messages)
    assert [it["content"] for it in checked] == ["be kind", "a\x00", "", "call_1", "call_2", "done"]
    assert [it["role"] for it in checked] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert checked[2]["tool_calls"] == [
        {"name": "weather", "arguments": {"city": "Köln"}}, {"name": "weather", "arguments": {"city": "Rom"}}
    ]  # fmt: skip
    assert all(it.keys() <= {"role", "content", "tool_calls", "tool_call_id"} for it in messages)


def test_a_whole_answer() -> None:
    body = answer().body(LINES)
    assert body == {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": NOW,
        "model": "phi",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Grüße\u2028😀", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 3,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def test_a_stream_has_the_same_text() -> None:
    data = stream(answer(stream=True), LINES)
    told = chunks(data)
    deltas = [it["choices"][0]["delta"] for it in told]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Gr"}, {"content": "üße\u2028😀"}, {}]
    assert [it["choices"][0]["finish_reason"] for it in told] == [None, None, None, "stop"]
    assert {it["id"] for it in told} == {"chatcmpl-0"}
    assert "usage" not in told[-1]


def test_usage_comes_last_if_asked_for() -> None:
    usage = {"include_usage": True}
    *before, last = chunks(stream(answer(stream=True, stream_options=usage), LINES))
    assert all(it["usage"] is None for it in before)
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 13


@pytest.mark.parametrize(
    ("reason", "told"), [("stop", "stop"), ("length", "length"), ("tool_calls", "tool_calls"), ("timeout", "length")]
)
def test_reasons_in_openais_words(reason: Any, told: str) -> None:
    items = [Delta(text="a"), End(0, reason)]
    assert answer().body(items)["choices"][0]["finish_reason"] == told
    assert chunks(stream(answer(), items))[-1]["choices"][0]["finish_reason"] == told


def test_a_stream_that_fails_ends_with_openais_error() -> None:
    data = answer().failure(WireError(503, "the engine is gone", code="engine"))
    assert json.loads(data.removeprefix(b"data: ")) == {
        "error": {"message": "the engine is gone", "type": "overloaded_error", "param": None, "code": "engine"}
    }


# The official client.


def test_the_client_reads_a_whole_answer() -> None:
    done = client(LINES).chat.completions.create(model="phi", messages=HI)
    type(done).model_validate(done.model_dump())
    assert done.choices[0].message.content == "Grüße\u2028😀"
    assert done.usage.prompt_tokens_details.cached_tokens == 4


def test_the_client_reads_a_stream() -> None:
    options = {"include_usage": True}
    told = list(client(LINES).chat.completions.create(model="phi", messages=HI, stream=True, stream_options=options))
    for it in told:
        type(it).model_validate_json(it.model_dump_json())
    assert "".join(it.choices[0].delta.content or "" for it in told if it.choices) == "Grüße\u2028😀"
    assert told[-1].usage.completion_tokens == 3


def test_the_client_reads_calls_and_sends_them_back() -> None:
    items = [Delta(text="So."), Delta(call=KÖLN), Delta(call=ROM), End(0, "tool_calls")]
    options: dict[str, Any] = {"model": "phi", "messages": HI, "tools": [TOOL]}
    message = client(items).chat.completions.create(**options).choices[0].message
    assert message.content == "So."
    assert [json.loads(it.function.arguments) for it in message.tool_calls] == [{"city": "Köln"}, {"city": "Rom"}]
    with client(items).chat.completions.stream(**options) as events:
        final = events.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    assert [it.id for it in final.choices[0].message.tool_calls] == ["call_1", "call_2"]
    results = [{"role": "tool", "tool_call_id": it.id, "content": "sun"} for it in message.tool_calls]
    done = client(LINES).chat.completions.create(**{**options, "messages": [*HI, message, *results]})
    assert done.choices[0].finish_reason == "stop"


def test_the_client_reads_calls_without_text() -> None:
    items = [Delta(call=KÖLN), End(0, "tool_calls")]
    message = client(items).chat.completions.create(model="phi", messages=HI, tools=[TOOL]).choices[0].message
    assert message.content is None and message.tool_calls[0].id == "call_1"


def test_the_client_reads_several_answers() -> None:
    items = [
        Delta(1, "b"), Delta(0, "a"), Delta(1, "B", call=KÖLN), End(1, "tool_calls", None, 10, 9, 2), Delta(0, "A"),
        End(0, "stop", None, 10, 0, 2),
    ]  # fmt: skip
    done = client(items).chat.completions.create(model="phi", messages=HI, n=2, tools=[TOOL])
    assert [it.message.content for it in done.choices] == ["aA", "bB"]
    assert [it.finish_reason for it in done.choices] == ["stop", "tool_calls"]
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (10, 4)
    assert done.usage.prompt_tokens_details.cached_tokens == 0
    with client(items).chat.completions.stream(model="phi", messages=HI, n=2, tools=[TOOL]) as events:
        streamed = events.get_final_completion()
    assert [it.message.content for it in streamed.choices] == ["aA", "bB"]


def test_the_client_reads_logprobs() -> None:
    items = [Delta(logprobs=LOGPROBS[:1]), Delta(text="é", logprobs=LOGPROBS[1:]), End(0)]
    options: dict[str, Any] = {"model": "phi", "messages": HI, "logprobs": True, "top_logprobs": 2}
    content = client(items).chat.completions.create(**options).choices[0].logprobs.content
    assert [it.token for it in content] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert bytes(itertools.chain(*(it.bytes for it in content))).decode() == "é"
    assert [it.logprob for it in content[0].top_logprobs] == [-0.5, -1.0]
    told = client(items).chat.completions.create(**options, stream=True)
    streamed = [entry for it in told if it.choices[0].logprobs for entry in it.choices[0].logprobs.content]
    assert [it.model_dump() for it in streamed] == [it.model_dump() for it in content]


def test_the_client_raises_refusals_and_failures() -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError) as caught:
        client(LINES).chat.completions.create(model="phi", messages=HI, n=99)
    assert caught.value.param == "n" and caught.value.type == "invalid_request_error"
    told = client(LINES, WireError(500, "it broke")).chat.completions.create(model="phi", messages=HI, stream=True)
    with pytest.raises(openai.APIError, match="it broke"):
        list(told)


def test_thoughts_are_a_field_beside_the_content() -> None:
    message = answer().body(THOUGHTS)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Let me see.", "It is 4.")
    assert "reasoning_content" not in answer().body(LINES)["choices"][0]["message"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(stream(answer(stream=True), THOUGHTS))]
    assert deltas == [
        {"role": "assistant", "content": ""}, {"reasoning_content": "Let me "}, {"reasoning_content": "see."},
        {"content": "It is 4."}, {},
    ]  # fmt: skip
    told = client(THOUGHTS).chat.completions.create(model="phi", messages=HI).choices[0].message
    assert (told.reasoning_content, told.content) == ("Let me see.", "It is 4.")


def test_the_defaults_of_a_model_hold_for_each_field_that_is_not_sent() -> None:
    own = Sampling(temp=0.6, top_p=0.95)
    for more, sampling in (
        ({}, own), ({"temperature": None, "top_p": None}, own), ({"temperature": 0}, Sampling(temp=0, top_p=0.95)),
        ({"top_p": 1, "seed": 3}, Sampling(temp=0.6, top_p=1, seed=3)),
    ):  # fmt: skip
        assert parse({"messages": HI, **more}, V, own).sampling == sampling

"""A conversation past the end of the server's context, in each API: refused, or answered without its oldest turns."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import pytest

from phi4_mlx.chat.conversation import Conversation, Turn
from phi4_mlx.generation.memory import ContextPlan
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.tokens.overflow import split_turns
from tests.unit.server.in_process import InProcessServer, events_of

APIS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
CONTEXT = 1024


def sized(folder: Any, **options: Any) -> InProcessServer:
    """A server with room for `CONTEXT` tokens."""
    server = InProcessServer(folder, **options)
    server.supervisor.longest = CONTEXT
    return server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> InProcessServer:
    return sized(tmp_path_factory.mktemp("oldest"), overflow="oldest")


@pytest.fixture(scope="module")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> InProcessServer:
    return sized(tmp_path_factory.mktemp("stop"))


def talk(turns: int, words: int = 60) -> list[dict[str, Any]]:
    """Messages: turns with a call and its result in each, and a question."""
    messages: list[dict[str, Any]] = []
    for number in range(turns):
        call = {"id": f"c{number}", "type": "function", "function": {"name": "add", "arguments": f'{{"n": {number}}}'}}
        messages += [
            {"role": "user", "content": f"question {number}" + " so" * words},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{number}", "content": str(number)},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    return [*messages, {"role": "user", "content": "and then?"}]


PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False}


def body(path: str, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The same request in an API's form."""
    given: dict[str, Any] = {"model": "tiny", "temperature": 0, **more}
    if path == "/v1/chat/completions":
        tool = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}
        system = {"role": "system", "content": "Be brief."}
        return {"max_tokens": 5, "messages": [system, *messages], "tools": [tool]} | given
    if path == "/v1/responses":
        items: list[Any] = []
        for message in messages:
            for call in message.get("tool_calls", ()):
                items.append({"type": "function_call", "call_id": call["id"], **call["function"]})
            if message["role"] == "tool":
                output = {"type": "function_call_output", "call_id": message["tool_call_id"]}
                items.append({**output, "output": message["content"]})
            elif message["content"]:
                items.append({"role": message["role"], "content": message["content"]})
        tool = {"type": "function", "name": "add", "parameters": PARAMETERS}
        return {"max_output_tokens": 5, "instructions": "Be brief.", "input": items, "tools": [tool]} | given
    blocks: list[Any] = []
    for message in messages:
        content: Any = message["content"]
        if message["role"] == "tool":
            content = [{"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": content}]
        if calls := message.get("tool_calls"):
            content = [
                {"type": "tool_use", "id": c["id"], "name": "add", "input": json.loads(c["function"]["arguments"])}
                for c in calls
            ]
        blocks.append({"role": "user" if message["role"] == "tool" else message["role"], "content": content})
    tools = [{"name": "add", "input_schema": PARAMETERS}]
    return {"max_tokens": 5, "system": "Be brief.", "messages": blocks, "tools": tools} | given


def read_tokens(answer: dict[str, Any]) -> int:
    """The tokens of the prompt, by the answer's usage."""
    usage = answer["usage"]
    return int(usage.get("prompt_tokens", usage.get("input_tokens", 0)) + usage.get("cache_read_input_tokens", 0))


def said(answer: dict[str, Any]) -> Any:
    """The answer without ids, dates and counts."""
    if "choices" in answer:
        return answer["choices"][0]["message"]["content"]
    if "output" in answer:
        return [part["text"] for item in answer["output"] for part in item.get("content", ())]
    return [block.get("text") for block in answer["content"]]


@pytest.mark.parametrize("path", APIS)
def test_the_oldest_turns_fall_out_and_the_answer_says_how_many(
    server: InProcessServer, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    messages = talk(20)
    with caplog.at_level(logging.INFO, "phi4_mlx.server"):
        long = server.post(path, body(path, messages))
    assert long.status_code == 200, long.text
    dropped = int(long.headers["x-phi4-ignored"].removesuffix(" oldest turns"))
    assert 10 < dropped < 20 and f'ignored="{dropped} oldest turns"' in caplog.text
    kept = server.post(path, body(path, messages[4 * dropped :]))
    assert "x-phi4-ignored" not in kept.headers
    assert said(long.json()) == said(kept.json())
    assert 500 < read_tokens(long.json()) == read_tokens(kept.json()) <= CONTEXT - 5
    if path == "/v1/responses":
        assert (long.json()["truncation"], kept.json()["truncation"]) == ("auto", "disabled")


@pytest.mark.parametrize("path", APIS)
def test_a_stream_says_it_too(server: InProcessServer, path: str) -> None:
    streamed = server.post(path, body(path, talk(20), stream=True))
    assert streamed.headers["x-phi4-ignored"].endswith(" oldest turns") and len(events_of(streamed)) > 2


class SmallConversation(Conversation):
    """A conversation with the server's room."""

    context = CONTEXT

    @property
    def plan(self) -> ContextPlan:
        return replace(super().plan, longest=CONTEXT)


def test_all_apis_keep_the_same_turns_as_the_chat(server: InProcessServer) -> None:
    plain = [each for each in talk(40) if each["role"] in ("user", "assistant") and each["content"]]
    tokenizer, model = server.supervisor.tokenizer, server.supervisor.engine.sequences.model
    chat = SmallConversation(model, tokenizer, "Be brief.", overflow="oldest")
    pairs = zip(plain[::2], plain[1::2], strict=False)
    chat.turns = [Turn(q["content"], a["content"], tuple(tokenizer.encode(a["content"]))) for q, a in pairs]
    list(chat.ask(plain[-1]["content"], DecodeOptions(max_tokens=5)))
    answers = [server.post(path, body(path, plain, tools=[])) for path in APIS]
    assert {each.headers["x-phi4-ignored"] for each in answers} == {f"{chat.dropped} oldest turns"}
    assert {read_tokens(each.json()) for each in answers} == {chat.usage.prompt_tokens}


def test_the_start_moves_seldom_so_that_the_prefix_cache_serves(server: InProcessServer) -> None:
    cached = []
    for turns in range(30, 42):
        answer = server.post("/v1/chat/completions", body("/v1/chat/completions", talk(turns, 5))).json()
        usage = answer["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] / 2)
    assert cached.count(True) > len(cached) / 2


@pytest.mark.parametrize("path", APIS)
def test_by_default_it_is_refused_and_the_way_on_is_named(strict_server: InProcessServer, path: str) -> None:
    refused = strict_server.post(path, body(path, talk(20)))
    message = refused.json()["error"]["message"]
    assert refused.status_code == 400 and message.startswith("prompt is too long: ")
    assert message.endswith("started with --context-overflow oldest, it would leave out the oldest turns")
    alone = strict_server.post(path, body(path, [{"role": "user", "content": "word " * 3_000}]))
    assert alone.status_code == 400 and "--context-overflow" not in alone.json()["error"]["message"]
    short = strict_server.post(path, body(path, talk(2)))
    assert short.status_code == 200 and "x-phi4-ignored" not in short.headers


@pytest.mark.parametrize("path", APIS)
def test_a_question_too_long_by_itself_is_refused_by_its_own_length(server: InProcessServer, path: str) -> None:
    question = {"role": "user", "content": "word " * 3_000}
    refused = server.post(path, body(path, [*talk(5)[:-1], question]))
    alone = server.post(path, body(path, [question]))
    assert refused.status_code == alone.status_code == 400
    told, told_alone = (each.json()["error"]["message"] for each in (refused, alone))
    assert told == f"{told_alone}; 5 oldest turns left out already"


def test_a_plain_prompt_has_no_turns(server: InProcessServer) -> None:
    refused = server.post("/v1/completions", {"prompt": [5] * CONTEXT, "max_tokens": 1})
    assert refused.status_code == 400 and refused.json()["error"]["message"].endswith("holds 1024 with answer")
    assert server.post("/v1/completions", {"prompt": [5] * 20, "max_tokens": 1}).status_code == 200


def test_tokens_are_counted_as_they_are_sent(server: InProcessServer, strict_server: InProcessServer) -> None:
    asked = body("/v1/messages", talk(20))
    counts = [each.post("/v1/messages/count_tokens", asked).json() for each in (server, strict_server)]
    assert counts[0] == counts[1] and counts[0]["input_tokens"] > CONTEXT


def test_the_room_for_the_answer_is_kept(server: InProcessServer) -> None:
    for limit, room in ((5, 5), (400, 400), (900, 512), (None, 256)):
        asked = body("/v1/chat/completions", talk(20, 10), max_tokens=limit, stop=list("aeiou"))
        answer = server.post("/v1/chat/completions", asked)
        read = answer.json()["usage"]["prompt_tokens"]
        assert CONTEXT - room - 330 < read <= CONTEXT - room  # a stride, and the rest of a turn
        assert ("max_tokens" in answer.headers["x-phi4-ignored"]) == (limit == 900)


def test_instructions_in_mid_conversation_go_with_the_question_after_them(server: InProcessServer) -> None:
    messages: list[dict[str, Any]] = []
    for number in range(30):
        messages += [{"role": "system", "content": f"It is day {number}."}, *talk(1)[:-1]]
    given = body("/v1/chat/completions", messages)["messages"][:-1]
    head, turns = split_turns(given)
    assert [each["content"] for each in head] == ["Be brief.", "It is day 0."]
    assert [each[0]["content"] for each in turns[1:]] == [f"It is day {number}." for number in range(1, 30)]
    answer = server.post("/v1/chat/completions", body("/v1/chat/completions", [*messages, talk(0)[0]]))
    assert answer.status_code == 200 and answer.headers["x-phi4-ignored"].endswith(" oldest turns")

"""The bridge with a reasoning model whose cache returns to snapshots: thoughts, defaults, tools, and shared prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from phi4_mlx import bridge
from phi4_mlx.bridge import model as bridge_model
from phi4_mlx.generation import answer
from phi4_mlx.generation.sampling import Sampling
from tests.tiny_sambay import write_tiny_sambay
from tests.unit.scripted_stream import ScriptedStream

ASK = [{"role": "user", "content": "What is 2 + 2? " * 10}]
REPLY = "<think>\nTwo and two.\n</think>\n\nIt is 4."
CALL = '<|tool_call|>[{"name": "add", "arguments": {"a": 2}}]<|/tool_call|>'
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    loaded = bridge.load(str(write_tiny_sambay(tmp_path_factory.mktemp("bridge") / "flash")))
    assert loaded["event"] == "finish", loaded
    yield loaded["model"]
    assert bridge.unload(loaded["model"])["event"] == "finish"


def joined(events: list[dict[str, Any]], kind: str) -> str:
    return "".join(event["text"] for event in events if event["event"] == kind)


@pytest.mark.parametrize(
    ("reply", "thought", "text"),
    [(REPLY, "Two and two.", "It is 4."), ("It is 4.", "", "It is 4."), ("<think>\nnever </th", "never </th", "")],
)
def test_thoughts_are_events_and_no_part_of_the_message(
    reply: str, thought: str, text: str, model: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "stream", ScriptedStream(reply, "length"))
    *events, finish = bridge.chat_events(model, ASK)
    assert (joined(events, "thought"), joined(events, "token")) == (thought, text)
    assert (finish.get("thought", ""), finish["text"], finish["message"]["content"]) == (thought, text, text)
    assert finish["reason"] == "length" and not finish["complete"]
    whole = bridge.complete(model, "a plain text")  # goes on with any text, tags included
    assert whole["text"] == reply and "thought" not in whole


def test_a_call_follows_thoughts(model: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "stream", ScriptedStream(f"<think>{CALL}?</think>{CALL}"))
    *events, finish = bridge.chat_events(model, ASK, tools=[ADD])
    assert [event["name"] for event in events if event["event"] == "tool_call"] == ["add"]
    assert finish["thought"] == f"{CALL}?" and finish["text"] == "" and finish["reason"] == "tool_calls"
    result = {"role": "tool", "tool_call_id": finish["message"]["tool_calls"][0]["id"], "content": "4"}
    monkeypatch.setattr(answer, "stream", ScriptedStream(REPLY))
    assert bridge.chat(model, [*ASK, finish["message"], result], tools=[ADD])["text"] == "It is 4."


@pytest.mark.parametrize(
    ("options", "temp", "top_p", "most"),
    [
        ({}, 0.6, 0.95, None), ({"temp": 0}, 0, 0.95, None), ({"top_p": 1.0, "temp": None}, 0.6, 1.0, None),
        ({"max_tokens": 7}, 0.6, 0.95, 7), ({"max_tokens": 40_000}, 0.6, 0.95, None),
    ],
)  # fmt: skip
def test_the_authors_sampling_is_the_default(
    options: dict[str, Any], temp: float, top_p: float, most: int | None, model: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Sampling] = []

    class Noted(Sampling):
        def sampler(self) -> Any:
            drawn.append(self)
            return super().sampler()

    monkeypatch.setattr(bridge_model, "Sampling", Noted)
    monkeypatch.setattr(answer, "stream", script := ScriptedStream(REPLY))
    finish = bridge.chat(model, ASK, **options)
    assert (drawn[0].temp, drawn[0].top_p) == (temp, top_p)
    assert script.options.max_tokens == (most or 1_024 - finish["prompt_tokens"])  # what the context has room for


def test_later_prompts_begin_where_they_differ(model: int) -> None:
    greedy = {"temp": 0, "max_tokens": 6}
    first = bridge.chat(model, ASK, **greedy)
    again = bridge.chat(model, ASK, **greedy)
    assert again["text"] == first["text"] and again["cached_tokens"] == first["prompt_tokens"] - 1
    longer = [*ASK, first["message"], {"role": "user", "content": "and 3?"}]
    second = bridge.chat(model, longer, **greedy)
    assert second["cached_tokens"] >= first["prompt_tokens"] - 1
    assert bridge.chat(model, ASK, **greedy)["text"] == first["text"]  # the last turn taken back
    assert bridge.use_adapter(model)["event"] == "finish"  # with a cache of its own
    fresh = bridge.chat(model, longer, **greedy)
    assert (fresh["text"], fresh["cached_tokens"]) == (second["text"], 0)


def test_a_cancelled_answer_leaves_a_cache_that_fits(model: int) -> None:
    expected = bridge.chat(model, ASK, temp=0, max_tokens=6)["text"]
    for _ in range(3):
        stream = bridge.start_chat(model, ASK, max_tokens=800, temp=0)
        bridge.next_event(stream)
        assert bridge.cancel(stream)
        while bridge.next_event(stream)["event"] != "finish":
            pass
    assert bridge.chat(model, ASK, temp=0, max_tokens=6)["text"] == expected

"""The bridge: plain types, no exceptions, streams that end, one thread for MLX, cancellation from any thread."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import bridge
from phi4_mlx.adapters.layers import add_adapter
from phi4_mlx.bridge import WORKER
from phi4_mlx.checkpoint import load
from phi4_mlx.generation import answer
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.stream import GenerationResponse, generate, stream
from tests.adapters import save_adapter
from tests.conftest import ROOT

ASK = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]},
    },
}
LONG = {"max_tokens": 3_000, "schema": {"type": "string", "minLength": 2_000}}  # long enough to be cancelled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import write_tiny_checkpoint

    sizes = {"max_position_embeddings": 2**13, "original_max_position_embeddings": 2**12}
    return write_tiny_checkpoint(tmp_path_factory.mktemp("bridge") / "tiny", **sizes)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[int]:
    loaded = bridge.load(str(folder))
    assert loaded == {"event": "finish", "model": loaded["model"], "context": 2**13}
    yield loaded["model"]
    assert bridge.unload(loaded["model"]) == {"event": "finish"}


def events_of(stream: int) -> list[dict[str, Any]]:
    events = [bridge.next_event(stream)]
    while events[-1]["event"] not in ("finish", "error"):
        events.append(bridge.next_event(stream))
    return events


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["text"] for event in events if event["event"] == "token")


def is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) is str and is_plain(each) for key, each in value.items())
    return all(map(is_plain, value)) if type(value) is list else type(value) in (str, int, float, bool)


def test_importing_it_brings_in_the_standard_library_and_starts_nothing() -> None:
    code = (
        "import sys, threading; before = set(sys.modules); import phi4_mlx.bridge as bridge;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(*sorted(new - set(sys.stdlib_module_names) - {'phi4_mlx'}), threading.active_count(), 'argparse' in new)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "False"], done.stderr


def test_whole_streamed_and_iterated_answers_are_the_same(model: int, folder: Path) -> None:
    whole = bridge.chat(model, ASK, max_tokens=20)
    tiny, tokenizer = load(folder)
    text = generate(tiny, tokenizer, tokenizer.apply_chat_template(ASK), max_tokens=20)
    assert whole["event"] == "finish" and whole["text"] == text and whole["reason"] in ("stop", "length")
    assert whole["message"] == {"role": "assistant", "content": text} and whole["prompt_tokens"] > 0
    streamed = events_of(bridge.start_chat(model, ASK, max_tokens=20))
    assert text_of(streamed) == text and len(streamed) > 3
    assert list(bridge.chat_events(model, ASK, max_tokens=20)) == streamed
    assert all(map(is_plain, [whole, *streamed]))

    whole = bridge.complete(model, "once", max_tokens=5)
    assert whole["text"] == generate(tiny, tokenizer, "once", max_tokens=5) and "message" not in whole
    assert text_of(events_of(bridge.start_complete(model, "once", max_tokens=5))) == whole["text"]
    assert text_of(list(bridge.complete_events(model, "once", max_tokens=5))) == whole["text"]


@pytest.mark.parametrize(
    ("call", "code", "complaint"),
    [
        (lambda m: bridge.load("no-such-folder"), "checkpoint", "neither a folder nor a Hub id"),
        (lambda m: bridge.load(5), "checkpoint", "neither a folder"),  # type: ignore[arg-type]
        (lambda m: bridge.unload(99), "request", "there is no model 99"),
        (lambda m: bridge.use_adapter(m, "no-such-folder"), "checkpoint", "holds no adapter_config.json"),
        (lambda m: bridge.count_tokens(99), "request", "there is no model 99"),
        (lambda m: bridge.count_tokens(m, messages=[{}]), "request", "message 0"),
        (lambda m: bridge.chat([], ASK), "request", r"there is no model \[\]"),  # type: ignore[arg-type]
        (lambda m: bridge.chat(m, []), "request", "at least one message"),
        (lambda m: bridge.chat(m, ASK, temp="hot"), "request", "temp"),
        (lambda m: bridge.chat(m, ASK, max_tokens=0), "request", "max_tokens must be"),
        (lambda m: bridge.chat(m, ASK, timeout_s="x"), "request", "timeout_s must be"),
        (lambda m: bridge.chat(m, ASK, colour="red"), "request", "'colour' is not known; known are max_tokens"),
        (lambda m: bridge.complete(m, "x", tools=[TOOL]), "request", "'tools' is not known"),
        (lambda m: bridge.chat(m, ASK, tools=[{}]), "request", "a tool needs a name"),
        (lambda m: bridge.chat(m, ASK, tools=[TOOL], tool_choice="x"), "request", "one of 'paint'"),
        (lambda m: bridge.chat(m, ASK, schema={"type": 5}), "request", "schema"),
        (lambda m: bridge.chat(m, ASK, schema={}, tools=[TOOL]), "request", "no room for tool calls"),
        (lambda m: bridge.chat(m, [{"role": "user", "content": "x " * 9_000}]), "request", "the context holds 8192"),
        (lambda m: bridge.next_event(99), "request", "there is no stream 99"),
        (lambda m: bridge.next_event([]), "request", r"there is no stream \[\]"),  # type: ignore[arg-type]
    ],
)
def test_what_goes_wrong_is_an_event(call: Callable[[int], Any], code: str, complaint: str, model: int) -> None:
    event = call(model)
    assert (event["event"], event["code"]) == ("error", code) and re.search(complaint, event["message"])
    assert "\n" not in event["message"] and is_plain(event)


def test_a_schema_and_tools(model: int) -> None:
    schema = TOOL["function"]["parameters"]  # type: ignore[index]
    answer = bridge.chat(model, ASK, schema=schema, temp=1.0, seed=1)
    assert json.loads(answer["text"])["colour"] in ("red", "blue")

    options: dict[str, Any] = {"tools": [TOOL], "temp": 1.0, "max_tokens": 60}
    events = events_of(bridge.start_chat(model, ASK, tool_choice="required", seed=1, **options))
    calls = [event for event in events if event["event"] == "tool_call"]
    finish = events[-1]
    assert finish["reason"] == "tool_calls" and finish["complaint"] == "" and calls and text_of(events) == ""
    assert all(call["name"] == "paint" and call["arguments"]["colour"] in ("red", "blue") for call in calls)
    made = finish["message"]["tool_calls"]
    assert [call["id"] for call in made] == [call["id"] for call in calls] and made[0]["id"] == "call_1"
    assert json.loads(made[0]["function"]["arguments"]) == calls[0]["arguments"] and all(map(is_plain, events))

    results = [{"role": "tool", "tool_call_id": call["id"], "content": "done"} for call in calls]
    messages = [*ASK, finish["message"], *results]
    again = bridge.chat(model, messages, tool_choice="paint", **options)
    assert again["message"]["tool_calls"][0]["id"] == f"call_{len(calls) + 1}"
    none = bridge.chat(model, ASK, tools=[TOOL], tool_choice="none", max_tokens=5)
    assert none["reason"] == "length"


def test_a_cut_answer_is_told_as_such(model: int) -> None:
    options: dict[str, Any] = {"tools": [TOOL], "temp": 1.0, "tool_choice": "paint", "seed": 1}
    whole = bridge.chat(model, ASK, **options)
    assert (whole["reason"], whole["complete"]) == ("tool_calls", True)
    for limit in range(1, 60):
        events = events_of(bridge.start_chat(model, ASK, max_tokens=limit, **options))
        finish = events[-1]
        calls = [event for event in events if event["event"] == "tool_call"]
        if finish["complete"]:
            break
        assert finish["reason"] == "length"
        made = whole["message"]["tool_calls"] if calls else None
        assert finish["message"].get("tool_calls") == made and text_of(events) == finish["text"]
    assert limit > 5 and (finish["reason"], finish["message"]) == ("tool_calls", whole["message"])
    text = {"schema": {"type": "string", "maxLength": 30}, "temp": 1.0, "seed": 2}
    told = [bridge.chat(model, ASK, max_tokens=limit, **text) for limit in range(1, 50)]
    assert {each["complete"] for each in told} == {True, False}
    for each in told:
        assert each["complete"] == (each["reason"] == "stop")
        assert not each["complete"] or each["text"] == told[-1]["text"]


def test_a_conversation_that_goes_on_runs_its_new_tokens_alone(model: int) -> None:
    first = bridge.chat(model, [{"role": "user", "content": "a long beginning " * 20}], max_tokens=3)
    messages = [{"role": "user", "content": "a long beginning " * 20}, first["message"], *ASK]
    second = bridge.chat(model, messages, max_tokens=3)
    assert second["cached_tokens"] >= first["prompt_tokens"] - 1
    assert second["prompt_tokens"] - second["cached_tokens"] < 20


def test_an_adapter_goes_on_and_off(model: int, folder: Path, tmp_path: Path) -> None:
    tiny, _ = load(folder)
    add_adapter(tiny, rank=2, scale=50.0)
    for layer in tiny.layers:  # b is made of zeros
        layer.mlp.down_proj.lora_b = mx.random.normal(layer.mlp.down_proj.lora_b.shape, key=mx.random.key(1))
    save_adapter(tiny, tmp_path / "adapter", {})
    plain = bridge.chat(model, ASK, max_tokens=20)["text"]
    assert bridge.use_adapter(model, str(tmp_path / "adapter")) == {"event": "finish"}
    adapted = bridge.chat(model, ASK, max_tokens=20)
    assert adapted["text"] != plain and adapted["cached_tokens"] == 0
    assert bridge.use_adapter(model) == {"event": "finish"}
    off = bridge.chat(model, ASK, max_tokens=20)
    assert off["text"] == plain and off["cached_tokens"] == 0
    loaded = bridge.load(str(folder), adapter_path=str(tmp_path / "adapter"))
    assert bridge.chat(loaded["model"], ASK, max_tokens=20)["text"] == adapted["text"]
    bridge.unload(loaded["model"])


def test_a_stream_is_cancelled_from_another_thread(model: int) -> None:
    stream = bridge.start_chat(model, ASK, **LONG)
    waiting = bridge.start_chat(model, ASK, **LONG)
    assert bridge.next_event(stream)["event"] == "token"
    thread = threading.Thread(target=lambda: (bridge.cancel(waiting), bridge.cancel(stream)))
    thread.start()
    thread.join()
    finish = events_of(stream)[-1]
    assert finish["reason"] == "cancelled" and finish["text"] and finish["answer_tokens"] < 3_000
    assert events_of(waiting)[-1]["answer_tokens"] == 0  # cancelled before it began
    assert not bridge.cancel(stream) and not bridge.cancel("x")  # type: ignore[arg-type]
    assert bridge.next_event(stream)["code"] == "request"
    assert bridge.chat(model, ASK, max_tokens=3)["event"] == "finish"


def test_an_iterator_that_is_left_cancels(model: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(*given: Any) -> Iterator[GenerationResponse]:
        for response in stream(*given):
            drawn.append(response.token)
            yield response

    monkeypatch.setattr(answer, "stream", counted)
    events = bridge.chat_events(model, ASK, **LONG)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert bridge.chat(model, ASK, max_tokens=1)["event"] == "finish"  # after the request before
    assert len(drawn) < 1_000 and not WORKER.streams


def test_a_time_limit(model: int) -> None:
    finish = events_of(bridge.start_chat(model, ASK, timeout_s=0.3, **LONG))[-1]
    assert finish["reason"] == "timeout" and finish["answer_tokens"] < 2_000


def test_waiting_for_an_event_has_a_limit(model: int) -> None:
    long = bridge.start_chat(model, ASK, **LONG)
    behind = bridge.start_chat(model, ASK, max_tokens=2)
    assert bridge.next_event(behind, 0.01) == {"event": "wait"}
    counted = bridge.count_tokens(model, "hello")  # does not wait
    assert counted["tokens"] > 0 and bridge.next_event(behind, 0.0) == {"event": "wait"}
    assert bridge.cancel(long) and events_of(long)[-1]["reason"] == "cancelled"
    assert events_of(behind)[-1]["reason"] in ("stop", "length")


def test_a_prefill_is_cancelled_between_its_chunks(model: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_chunks(model: Any, tokenizer: Any, ids: Any, cache: Any, options: DecodeOptions) -> Iterator[Any]:
        def progress(done: int, total: int) -> None:
            time.sleep(0.01)
            assert options.prompt_progress_callback is not None
            options.prompt_progress_callback(done, total)

        slow = replace(options, prefill_step_size=4, prompt_progress_callback=progress)
        return stream(model, tokenizer, ids, cache, slow)

    monkeypatch.setattr(answer, "stream", slow_chunks)
    long_prompt = [{"role": "user", "content": "x " * 3_000}]
    finish = events_of(bridge.start_chat(model, long_prompt, max_tokens=1, timeout_s=0.2))[-1]
    assert (finish["reason"], finish["answer_tokens"]) == ("timeout", 0)


def test_what_breaks_inside_costs_its_own_request(model: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bridge.chat(model, ASK, max_tokens=8)["text"]

    def breaks(*given: Any, **options: Any) -> Iterator[Any]:
        raise RuntimeError("a\nbug")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(answer, "stream", breaks)
        assert events_of(bridge.start_chat(model, ASK)) == [
            {"event": "error", "code": "internal", "message": "RuntimeError: a bug"}
        ]
    assert bridge.chat(model, ASK, max_tokens=8)["text"] == expected


def test_unloading_cancels_what_is_under_way(folder: Path) -> None:
    model = bridge.load(str(folder))["model"]
    stream = bridge.start_chat(model, ASK, **LONG)
    assert bridge.next_event(stream)["event"] == "token"
    assert bridge.unload(model) == {"event": "finish"}
    assert events_of(stream)[-1]["reason"] == "cancelled"
    assert bridge.chat(model, ASK)["message"] == f"there is no model {model}; load returns a model's number"


def test_all_of_mlx_is_on_one_thread_whoever_calls(model: int) -> None:
    answers: list[Any] = []

    def ask() -> None:
        answers.append(bridge.chat(model, ASK, max_tokens=8))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer["event"] for answer in answers] == ["finish"] * 4
    assert len({answer["text"] for answer in answers}) == 1


TWINS = (
    "load", "unload", "use_adapter", "count_tokens", "chat", "complete", "start_chat", "start_complete", "next_event",
    "cancel",
)  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_every_function_has_a_twin_that_takes_and_returns_json(name: str) -> None:
    twin = getattr(bridge, f"{name}_json")
    assert list(inspect.signature(twin).parameters) == ["arguments"]
    for bad in ("", "[", "5", "[]", "{}", '{"nope": 1}', "[" * 100_000, '{"a":' * 5_000):
        event = json.loads(twin(bad))
        assert event["code"] == "request" and event["message"].startswith(name), bad


def test_twins_do_as_their_functions(model: int, folder: Path) -> None:
    request = {"model": model, "messages": ASK, "max_tokens": 8}
    whole = json.loads(bridge.chat_json(json.dumps(request)))
    assert whole == {**bridge.chat(**request), "cached_tokens": whole["cached_tokens"]}  # type: ignore[arg-type]
    stream = json.loads(bridge.start_chat_json(json.dumps(request)))
    events = [json.loads(bridge.next_event_json(json.dumps({"stream": stream})))]
    while events[-1]["event"] == "token":
        events.append(json.loads(bridge.next_event_json(json.dumps({"stream": stream}))))
    assert text_of(events) == whole["text"] == events[-1]["text"]
    assert bridge.cancel_json(json.dumps({"stream": stream})) == "false"
    text = {"model": model, "prompt": "once", "max_tokens": 3}
    assert json.loads(bridge.complete_json(json.dumps(text)))["text"]
    stream = json.loads(bridge.start_complete_json(json.dumps(text)))
    assert events_of(stream)[-1]["event"] == "finish"
    assert json.loads(bridge.count_tokens_json(json.dumps({"model": model, "text": "a"}))) == {
        "event": "finish", "tokens": 1
    }  # fmt: skip
    loaded = json.loads(bridge.load_json(json.dumps({"name": str(folder)})))["model"]
    assert json.loads(bridge.use_adapter_json(json.dumps({"model": loaded}))) == {"event": "finish"}
    assert json.loads(bridge.unload_json(json.dumps({"model": loaded}))) == {"event": "finish"}


def test_the_version_is_a_text() -> None:
    assert isinstance(bridge.version(), str)


def test_what_the_grammar_does_not_enforce_is_in_the_last_event(model: int) -> None:
    parameters = {"type": "object", "properties": {"n": {"type": "array", "uniqueItems": True}}}
    function = {"name": "search", "parameters": parameters}
    tool = {"type": "function", "function": function}
    finish = bridge.chat(model, ASK, tools=[tool], max_tokens=2)
    assert "tool 'search'" in finish["loosened"][0] and "uniqueItems" in finish["loosened"][0] and is_plain(finish)
    assert bridge.chat(model, ASK, max_tokens=2)["loosened"] == []
    refused = bridge.chat(model, ASK, tools=[{**tool, "function": {**function, "strict": True}}], max_tokens=2)
    assert refused["code"] == "request" and "tool 'search'" in refused["message"]

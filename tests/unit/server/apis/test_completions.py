"""/v1/completions: parsed bodies, and answers that the official client reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from phi4_mlx.server.apis.completions import CompletionAnswer, parse
from phi4_mlx.server.apis.wire import Delta, End, WireError
from phi4_mlx.server.engine.protocol import TokenLogprob
from tests.unit.server.apis.harness import NOW, V, chunks, counted_ids, openai_client, refused, stream

TEXT = [Delta(text=" upon"), Delta(), Delta(text=" é"), End(0, "length", None, 10, 4, 3)]


def ask(**more: Any) -> Any:
    return parse({"model": "phi", "prompt": "Once", **more}, V)


def make_answer(asked: Any, texts: Sequence[str] = ()) -> CompletionAnswer:
    return CompletionAnswer(asked, NOW, 10, counted_ids(), texts)


def client(items: Sequence[Delta | End], texts: Sequence[str] = ()) -> Any:
    return openai_client(lambda body: make_answer(parse(body, V), texts), items)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([0, 999], [[0, 999]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("\x00", ["\x00"]),
    ],
)
def test_prompts(prompt: Any, prompts: Any) -> None:
    assert ask(prompt=prompt).prompts == prompts
    assert ask(prompt=prompt).messages == []


@pytest.mark.parametrize(
    "prompt",
    [
        None, "", [], [""], [[]], 5, {}, True, [True], [1, "a"], ["a", 1], [1, [2]], [[1], "a"], [1000], [-1],
        [[1, None]], [1.0], [1, True], [None], [[["a"]]], "\ud800", ["a"] * 129, [{}],
    ],
)  # fmt: skip
def test_a_malformed_prompt_is_refused(prompt: Any) -> None:
    message = refused(lambda: ask(prompt=prompt)).message
    assert "prompt" in message or "surrogate" in message


def test_max_tokens_defaults_to_openais_16() -> None:
    assert ask().max_tokens == 16
    assert ask(max_tokens=5).max_tokens == 5
    assert ask(max_tokens=None).max_tokens is None


def test_a_full_body_is_read() -> None:
    full = ask(n=2, best_of=2, logprobs=0, stop="x", stream=True, stream_options={"include_usage": True}, user="me")
    assert full.n == 2 and full.top_logprobs == 0 and full.stop == ("x",) and full.stream and full.include_usage
    assert ask(echo=True, suffix="").echo
    assert ask(best_of=3).ignored == ("best_of",)
    assert ask(logprobs=True).top_logprobs == 0 and ask(logprobs=False).top_logprobs is None


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("suffix", {"suffix": "the end"}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": 1, "echo": True}),
        ("echo", {"echo": 1}),
        ("prompt", {"prompt": ["a"] * 100, "n": 2}),
        ("n", {"n": 9}),
    ],
)
def test_a_body_that_cannot_be_served_is_refused(name: str, more: dict[str, Any]) -> None:
    assert refused(lambda: ask(**more)).param == name


def test_a_whole_answer() -> None:
    assert make_answer(ask()).body(TEXT) == {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": NOW,
        "model": "phi",
        "choices": [{"index": 0, "text": " upon é", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 3,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def test_a_stream_has_the_same_text() -> None:
    told = chunks(stream(make_answer(ask(stream_options={"include_usage": True})), TEXT))
    assert [it["choices"][0]["text"] for it in told[:-1]] == [" upon", " é", ""]
    assert [it["choices"][0]["finish_reason"] for it in told[:-1]] == [None, None, "length"]
    assert told[-1]["choices"] == [] and told[-1]["usage"]["total_tokens"] == 13


def test_several_prompts_several_times_each_with_its_echo() -> None:
    asked = ask(prompt=["a", "b"], n=2, echo=True)
    items = [
        Delta(3, "3"),
        Delta(1, "1"),
        Delta(0, "0"),
        Delta(2, "2"),
        *(End(i, prompt_tokens=5) for i in (2, 0, 1, 3)),
    ]
    body = make_answer(asked, ["a", "b"]).body(items)
    assert [it["text"] for it in body["choices"]] == ["a0", "a1", "b2", "b3"]
    assert [it["index"] for it in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 10
    texts = ["", "", "", ""]
    for it in chunks(stream(make_answer(asked, ["a", "b"]), items)):
        texts[it["choices"][0]["index"]] += it["choices"][0]["text"]
    assert texts == ["a0", "a1", "b2", "b3"]


def test_logprobs_have_the_offset_of_each_token() -> None:
    tokens = [
        TokenLogprob(b"a", -0.5, ((b"a", -0.5), (b"b", -1.5))),
        TokenLogprob(b"\xc3", -0.25, ((b"\xc3", -0.25),)),
        TokenLogprob(b"\xa9", -0.125),
        TokenLogprob(b"z", float("-inf")),
    ]
    items = [Delta(text="a", logprobs=tuple(tokens[:2])), Delta(text="éz", logprobs=tuple(tokens[2:])), End(0)]
    wanted = {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9", "z"],
        "token_logprobs": [-0.5, -0.25, -0.125, -9999.0],
        "top_logprobs": [
            {"a": -0.5, "b": -1.5}, {"bytes:\\xc3": -0.25}, {"bytes:\\xa9": -0.125}, {"z": -9999.0}
        ],
        "text_offset": [0, 1, 1, 2],
    }  # fmt: skip
    assert make_answer(ask(logprobs=2)).body(items)["choices"][0]["logprobs"] == wanted
    streamed: dict[str, list[Any]] = {name: [] for name in wanted}
    for it in chunks(stream(make_answer(ask(logprobs=2)), items)):
        for name, values in it["choices"][0]["logprobs"].items():
            streamed[name] += values
    assert streamed == wanted
    assert make_answer(ask()).body(items)["choices"][0]["logprobs"] is None


def test_a_stream_that_fails_ends_with_openais_error() -> None:
    told = make_answer(ask()).failure(WireError(500, "it broke"))
    assert json.loads(told.removeprefix(b"data: "))["error"]["message"] == "it broke"


def test_the_client_reads_answers_streams_and_refusals() -> None:
    openai = pytest.importorskip("openai")
    done = client(TEXT, ["Once"]).completions.create(model="phi", prompt="Once", echo=True)
    type(done).model_validate(done.model_dump())
    assert done.choices[0].text == "Once upon é" and done.usage.total_tokens == 13
    told = list(client(TEXT, ["Once"]).completions.create(model="phi", prompt="Once", echo=True, stream=True))
    assert "".join(it.choices[0].text for it in told) == "Once upon é"
    type(told[-1]).model_validate(told[-1].model_dump())
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client(TEXT).completions.create(model="phi", prompt="Once", suffix="end")

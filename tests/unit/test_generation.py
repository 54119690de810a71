"""Generation: three storeys, stop strings, limits, and one step of lookahead that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx import generation
from phi4_mlx.errors import RequestError
from phi4_mlx.generation import generate, generate_step, stream_generate
from phi4_mlx.models.text import Model
from phi4_mlx.sampling import make_logits_processors, make_sampler

CONTEXT, BOUNDARY = 1024, 64  # of the tiny models


class Letters:
    """A tokenizer whose ids are code points; the decoder gives each character a token later."""

    def __init__(self, eos_ids: Sequence[int] = ()):
        self.eos_ids = frozenset(eos_ids)

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def streaming_decoder(self) -> Letters:
        self.late = ""
        return self

    def add(self, token: int) -> str:
        now, self.late = self.late, chr(token)
        return now

    def finish(self) -> str:
        return self.late


class Script:
    """Stands in for the sampler: draws the tokens of a text, one after the other."""

    def __init__(self, text: str):
        self.left: Iterator[int] = (ord(c) for c in text)

    def __call__(self, logprobs: mx.array) -> mx.array:
        return mx.array([next(self.left, 0)])


def said(model: Model, text: str, eos: str = "", **options: Any) -> list[tuple[str, str | None]]:
    tokenizer = Letters([ord(c) for c in eos])
    events = stream_generate(model, tokenizer, "hi", sampler=Script(text), **options)
    return [(event.text, event.finish_reason) for event in events]


def naive(model: Model, prompt: list[int], n: int) -> list[int]:
    """Greedy without any cache."""
    grown = list(prompt)
    for _ in range(n):
        grown.append(int(model(mx.array([grown]))[0, -1].argmax().item()))
    return grown[len(prompt) :]


@pytest.mark.parametrize("length", [1, 30, BOUNDARY - 1, BOUNDARY, BOUNDARY + 1, 150])
@pytest.mark.parametrize("step_size", [1, 16, 2048])
def test_greedy_equals_no_cache_at_all(tiny_model: Callable[..., Model], length: int, step_size: int) -> None:
    model, prompt = tiny_model(), np.random.default_rng(length).integers(0, 512, length).tolist()
    drawn = [token for token, _ in generate_step(prompt, model, max_tokens=8, prefill_step_size=step_size)]
    assert drawn == naive(model, prompt, 8)


def test_logprobs_are_the_models(tiny_model: Callable[..., Model]) -> None:
    model, prompt = tiny_model(), [5, 6, 7]
    (token, logprobs), *_ = generate_step(prompt, model, max_tokens=2)
    logits = model(mx.array([prompt]))[0, -1]
    assert mx.allclose(logprobs, logits - mx.logsumexp(logits), atol=1e-4)
    assert token == int(mx.argmax(logprobs).item())
    assert mx.exp(logprobs).sum().item() == pytest.approx(1, abs=1e-4)


def test_prefill_computes_logits_for_the_last_position_alone(
    tiny_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    head = Model.logits
    monkeypatch.setattr(Model, "logits", lambda self, hidden: (seen.append(hidden.shape), head(self, hidden))[1])
    list(generate_step(list(range(50)), tiny_model(), max_tokens=2, prefill_step_size=16))
    assert seen == [(1, 1, 96)] * 2


def test_a_second_turn_prefills_only_the_new_tokens(tiny_model: Callable[..., Model]) -> None:
    model, first, second = tiny_model(), list(range(40)), [9, 8, 7]
    cache = model.make_cache()
    drawn = [token for token, _ in generate_step(first, model, max_tokens=4, cache=cache)]
    rest = cache.reuse([*first, *drawn, *second])
    assert len(rest) <= len(second) + 1
    events = list(stream_generate(model, Letters(), rest, cache=cache, max_tokens=5))
    assert events[-1].prompt_tokens == len(rest)
    assert [event.token for event in events] == naive(model, [*first, *drawn, *second], 5)


def test_a_crossing_is_told_and_its_progress_shown(tiny_model: Callable[..., Model]) -> None:
    model, progress = tiny_model(), []
    events = list(
        stream_generate(
            model,
            Letters(),
            list(range(BOUNDARY - 3)),
            max_tokens=10,
            prefill_step_size=32,
            prompt_progress_callback=lambda done, total: progress.append((done, total)),
        )
    )
    assert [event.reprefilled for event in events if event.reprefilled] == [BOUNDARY]
    assert progress == [(0, 61), (32, 61), (61, 61), (0, 65), (32, 65), (64, 65), (65, 65)]


def test_a_long_prompt_is_prefilled_once(tiny_model: Callable[..., Model]) -> None:
    events = list(stream_generate(tiny_model(), Letters(), list(range(200)), max_tokens=3, prefill_step_size=16))
    assert sum(event.reprefilled for event in events) == 0


def test_counts_speeds_and_reasons(tiny_model: Callable[..., Model]) -> None:
    events = list(stream_generate(tiny_model(), Letters(), "abc", max_tokens=4))
    assert [event.generation_tokens for event in events] == [1, 2, 3, 4]
    assert [event.finish_reason for event in events] == [None, None, None, "length"]
    last = events[-1]
    assert last.prompt_tokens == 3 and last.prompt_tps > 0 and last.generation_tps > 0 and last.peak_memory > 0


def test_the_end_marker_ends_the_turn_and_is_not_text(tiny_model: Callable[..., Model]) -> None:
    assert said(tiny_model(), "hello.rest", eos=".") == [("", None), *((c, None) for c in "hell"), ("o", "stop")]


def test_a_stop_string_ends_the_text_before_it(tiny_model: Callable[..., Model]) -> None:
    events = said(tiny_model(), "one ENd two END three", stop=["END", "XYZ"])
    assert "".join(text for text, _ in events) == "one ENd two "
    assert events[-1][1] == "stop" and all(reason is None for _, reason in events[:-1])
    # Nothing that may begin a stop string is let out before it is certain.
    grown = ""
    for text, _ in events:
        grown += text
        assert not grown.endswith(("E", "EN", "X", "XY"))


def test_what_was_held_back_comes_out_at_the_end(tiny_model: Callable[..., Model]) -> None:
    assert "".join(t for t, _ in said(tiny_model(), "abEN", stop="END", max_tokens=4)) == "abEN"
    assert "".join(t for t, _ in said(tiny_model(), "abEN.", eos=".", stop="END")) == "abEN"
    assert "".join(t for t, _ in said(tiny_model(), "abEND", stop="END", max_tokens=5)) == "ab"
    assert "".join(t for t, _ in said(tiny_model(), "aaab", stop="aab", max_tokens=4)) == "a"


def test_generate_is_the_stream_joined(tiny_model: Callable[..., Model], capsys: pytest.CaptureFixture[str]) -> None:
    model, options = tiny_model(), {"max_tokens": 12, "stop": "~"}
    text = generate(model, Letters(), "hello", **options)
    assert text == "".join(e.text for e in stream_generate(model, Letters(), "hello", **options))
    assert len(text) == 12
    assert generate(model, Letters(), "hello", verbose=True, **options) == text
    printed = capsys.readouterr().out
    assert printed.startswith(text) and "prompt: 5 tokens" in printed and "generation: 12 tokens" in printed


def test_samplers_and_processors_are_used(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    forced = generate_step([1, 2], model, max_tokens=3, logits_processors=make_logits_processors({77: 1000.0}))
    assert [token for token, _ in forced] == [77, 77, 77]
    penalised = make_logits_processors(repetition_penalty=100.0, repetition_context_size=1024)
    drawn = [token for token, _ in generate_step([1, 2], model, max_tokens=30, logits_processors=penalised)]
    assert len({1, 2, *drawn}) == 32

    def draw(seed: int) -> list[int]:
        return [t for t, _ in generate_step([1, 2], model, max_tokens=20, sampler=make_sampler(1.0, seed=seed))]

    assert draw(1) == draw(1) != draw(2)


def test_the_last_token_of_the_context_can_be_used(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(num_hidden_layers=1)
    assert len(list(generate_step([1] * (CONTEXT - 2), model, max_tokens=2))) == 2


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, r"the prompt has 0 tokens.* at least 1.*1024"),
        ("", {}, r"the prompt has 0 tokens"),
        ([1] * 1000, {"max_tokens": 25}, r"1000 prompt tokens and max_tokens 25 come to 1025.*1024"),
        ([512], {}, r"token 512 .* vocabulary of 512"),
        ([-1], {}, r"token -1 "),
        ([1], {"max_tokens": 0}, r"max_tokens must be a whole number from 1"),
        ([1], {"max_tokens": -5}, r"max_tokens"),
        ([1], {"max_tokens": 1.5}, r"max_tokens"),
        ([1], {"prefill_step_size": 0}, r"prefill_step_size"),
        ([1], {"stop": [""]}, r"stop"),
        ([1], {"stop": [1]}, r"stop"),
        ([1], {"stop": 5}, r"stop"),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    tiny_model: Callable[..., Model], prompt: list[int] | str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        list(stream_generate(tiny_model(), Letters(), prompt, **options))
    assert "\n" not in str(caught.value)


def test_generate_step_refuses_when_called_not_when_iterated(tiny_model: Callable[..., Model]) -> None:
    with pytest.raises(RequestError):
        generate_step([], tiny_model())


def test_cached_tokens_count_towards_the_context(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(num_hidden_layers=1)
    cache = model.make_cache()
    model(mx.array([[1] * 1000]), cache)
    with pytest.raises(RequestError, match="1000 cached tokens, 20 prompt tokens and max_tokens 5"):
        generate_step([1] * 20, model, cache=cache, max_tokens=5)


def test_metal_keeps_the_weights_wired_while_tokens_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal cannot be run everywhere; what is asked of it can be seen."""
    limits = [1000]
    monkeypatch.setattr(generation.mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(generation.mx, "device_info", lambda: {"max_recommended_working_set_size": 77})
    monkeypatch.setattr(generation.mx, "set_wired_limit", lambda new: (limits.append(new), limits[-2])[1])
    with pytest.raises(KeyError), generation._wired_memory():
        assert limits == [1000, 77]
        raise KeyError
    assert limits == [1000, 77, 1000]

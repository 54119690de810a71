"""`generate_step`, `stream_generate` and `generate`: prefill, stop strings, limits, masks and schemas."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.checkpoint import load
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.sampling import make_logits_processors, make_sampler
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.generation.stream import GenerationResponse, generate, stream_generate, wired_memory
from phi4_mlx.grammar.constraint import Constraint
from phi4_mlx.grammar.grammars import json_schema, tool_calls
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.text import Model
from phi4_mlx.tokens import prompt
from phi4_mlx.tokens.tokenizer import Tokenizer
from tests.conftest import BOUNDARY, CONTEXT, TinyCheckpoint, TinyModel
from tests.model_runs import close, decoded, greedy_without_cache, random_ids


class Letters:
    """A tokenizer whose ids are code points; its decoder returns each character one token late."""

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


class ScriptedSampler:
    """A sampler that draws the code points of a text, one after the other."""

    def __init__(self, text: str):
        self.left: Iterator[int] = (ord(c) for c in text)

    def __call__(self, logprobs: mx.array) -> mx.array:
        return mx.array([next(self.left, 0)])


def stream_of(model: Model, text: str, eos: str = "", **options: Any) -> list[tuple[str, str | None]]:
    """The text and the finish reason of each event when the model draws `text`."""
    tokenizer = Letters([ord(c) for c in eos])
    events = stream_generate(model, tokenizer, "hi", sampler=ScriptedSampler(text), **options)
    return [(event.text, event.finish_reason) for event in events]


@pytest.mark.parametrize("length", [1, 30, BOUNDARY - 1, BOUNDARY, BOUNDARY + 1, 150])
@pytest.mark.parametrize("step_size", [1, 16, 2048])
def test_greedy_decoding_equals_passes_without_a_cache(tiny_model: TinyModel, length: int, step_size: int) -> None:
    model, prompt = tiny_model(), np.random.default_rng(length).integers(0, 512, length).tolist()
    assert decoded(model, prompt, 8, prefill_step_size=step_size) == greedy_without_cache(model, prompt, 8)


def test_logprobs_are_normalised_logits_of_the_model(tiny_model: TinyModel) -> None:
    model, prompt = tiny_model(), [5, 6, 7]
    (token, logprobs), *_ = generate_step(prompt, model, max_tokens=2)
    logits = model(mx.array([prompt]))[0, -1]
    assert mx.allclose(logprobs, logits - mx.logsumexp(logits), atol=1e-4)
    assert token == int(mx.argmax(logprobs).item())
    assert mx.exp(logprobs).sum().item() == pytest.approx(1, abs=1e-4)


def test_prefill_computes_logits_for_the_last_position_alone(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    head = Model.logits

    def recording(model: Model, hidden: mx.array) -> mx.array:
        shapes.append(hidden.shape)
        return head(model, hidden)

    monkeypatch.setattr(Model, "logits", recording)
    decoded(tiny_model(), list(range(50)), 2, prefill_step_size=16)
    assert shapes == [(1, 1, 96)] * 2


def test_a_second_turn_prefills_only_the_new_tokens(tiny_model: TinyModel) -> None:
    model, first, second = tiny_model(), list(range(40)), [9, 8, 7]
    cache = model.make_cache()
    drawn = decoded(model, first, 4, cache=cache)
    rest = cache.reuse([*first, *drawn, *second])
    assert len(rest) <= len(second) + 1
    events = list(stream_generate(model, Letters(), rest, cache=cache, max_tokens=5))
    assert events[-1].prompt_tokens == len(rest)
    assert [event.token for event in events] == greedy_without_cache(model, [*first, *drawn, *second], 5)


def test_a_crossing_is_reported_with_its_progress(tiny_model: TinyModel) -> None:
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


def test_a_long_prompt_is_prefilled_once(tiny_model: TinyModel) -> None:
    events = list(stream_generate(tiny_model(), Letters(), list(range(200)), max_tokens=3, prefill_step_size=16))
    assert sum(event.reprefilled for event in events) == 0


def test_events_carry_counts_speeds_and_the_finish_reason(tiny_model: TinyModel) -> None:
    events = list(stream_generate(tiny_model(), Letters(), "abc", max_tokens=4))
    assert [event.generation_tokens for event in events] == [1, 2, 3, 4]
    assert [event.finish_reason for event in events] == [None, None, None, "length"]
    last = events[-1]
    assert last.prompt_tokens == 3 and last.prompt_tps > 0 and last.generation_tps > 0 and last.peak_memory > 0


def test_the_end_marker_ends_the_answer_and_is_not_text(tiny_model: TinyModel) -> None:
    assert stream_of(tiny_model(), "hello.rest", eos=".") == [("", None), *((c, None) for c in "hell"), ("o", "stop")]


def test_a_stop_string_ends_the_text_before_it(tiny_model: TinyModel) -> None:
    events = stream_of(tiny_model(), "one ENd two END three", stop=["END", "XYZ"])
    assert "".join(text for text, _ in events) == "one ENd two "
    assert events[-1][1] == "stop" and all(reason is None for _, reason in events[:-1])
    # Text that may begin a stop string is held back until the next tokens decide.
    so_far = ""
    for text, _ in events:
        so_far += text
        assert not so_far.endswith(("E", "EN", "X", "XY"))


def test_text_that_was_held_back_is_released_at_the_end(tiny_model: TinyModel) -> None:
    assert "".join(t for t, _ in stream_of(tiny_model(), "abEN", stop="END", max_tokens=4)) == "abEN"
    assert "".join(t for t, _ in stream_of(tiny_model(), "abEN.", eos=".", stop="END")) == "abEN"
    assert "".join(t for t, _ in stream_of(tiny_model(), "abEND", stop="END", max_tokens=5)) == "ab"
    assert "".join(t for t, _ in stream_of(tiny_model(), "aaab", stop="aab", max_tokens=4)) == "a"


def test_generate_joins_the_stream(tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    model, options = tiny_model(), {"max_tokens": 12, "stop": "~"}
    text = generate(model, Letters(), "hello", **options)
    assert text == "".join(e.text for e in stream_generate(model, Letters(), "hello", **options))
    assert len(text) == 12
    assert generate(model, Letters(), "hello", verbose=True, **options) == text
    printed = capsys.readouterr().out
    assert printed.startswith(text) and "prompt: 5 tokens" in printed and "generation: 12 tokens" in printed


def test_samplers_and_processors_are_used(tiny_model: TinyModel) -> None:
    model = tiny_model()
    biased = make_logits_processors({77: 1000.0})
    assert decoded(model, [1, 2], 3, logits_processors=biased) == [77, 77, 77]
    penalised = make_logits_processors(repetition_penalty=100.0, repetition_context_size=1024)
    assert len({1, 2, *decoded(model, [1, 2], 30, logits_processors=penalised)}) == 32

    def draw(seed: int) -> list[int]:
        return decoded(model, [1, 2], 20, sampler=make_sampler(1.0, seed=seed))

    assert draw(1) == draw(1) != draw(2)


def test_the_last_token_of_the_context_can_be_used(tiny_model: TinyModel) -> None:
    model = tiny_model(num_hidden_layers=1)
    assert len(decoded(model, [1] * (CONTEXT - 2), 2)) == 2


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, r"the prompt has 0 tokens.* at least 1.*1024"),
        ("", {}, r"the prompt has 0 tokens"),
        ([1] * 1000, {"max_tokens": 25}, r"1000 prompt tokens and max_tokens 25 come to 1025.*1024; lower .* to 24"),
        ([1] * 1024, {"max_tokens": 1}, r"come to 1025.*1024; shorten the prompt, or leave out its oldest turns"),
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
    tiny_model: TinyModel, prompt: list[int] | str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        list(stream_generate(tiny_model(), Letters(), prompt, **options))
    assert "\n" not in str(caught.value)


def test_generate_step_refuses_when_called_not_when_iterated(tiny_model: TinyModel) -> None:
    with pytest.raises(RequestError):
        generate_step([], tiny_model())


def test_cached_tokens_count_towards_the_context(tiny_model: TinyModel) -> None:
    model = tiny_model(num_hidden_layers=1)
    cache = model.make_cache()
    model(mx.array([[1] * 1000]), cache)
    with pytest.raises(RequestError, match="1000 cached tokens, 20 prompt tokens and max_tokens 5"):
        generate_step([1] * 20, model, cache=cache, max_tokens=5)


def test_the_wired_limit_of_metal_is_raised_for_a_generation_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces MLX's functions, because Metal is not available everywhere."""
    limits = [1000]

    def set_wired_limit(new: int) -> int:
        limits.append(new)
        return limits[-2]

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 77})
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    with pytest.raises(KeyError), wired_memory():
        assert limits == [1000, 77]
        raise KeyError
    assert limits == [1000, 77, 1000]


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "population": {"type": "integer", "maximum": 99_999}},
    "required": ["city", "population"],
    "additionalProperties": False,
}


@pytest.fixture
def loaded(tiny_checkpoint: TinyCheckpoint) -> tuple[Model, Tokenizer]:
    """A tiny model with random weights, and the tokenizer of its vocabulary."""
    return load(tiny_checkpoint())


class OneByOne:
    """A mask that allows the forced tokens of another one as single choices, so that each takes a step."""

    def __init__(self, mask: Constraint):
        self.inner, self.forced = mask, list[int]()

    def mask(self) -> mx.array:
        return mx.arange(512) == self.forced[0] if self.forced else self.inner.mask()

    def accept(self, token: int) -> list[int]:
        if self.forced:
            assert self.forced.pop(0) == token
        else:
            forced = self.inner.accept(token)
            assert forced is not None
            self.forced = forced
        return []


def record_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the new tokens of each forward pass."""
    passes: list[int] = []
    admit = PromptCache.admit

    def recording(cache: PromptCache, ids: mx.array, places: Iterable[prompt.Place] = ()) -> mx.array:
        passes.append(ids.shape[1])
        return admit(cache, ids, places)

    monkeypatch.setattr(PromptCache, "admit", recording)
    return passes


@pytest.mark.parametrize("length", [3, BOUNDARY - 20, BOUNDARY - 8, BOUNDARY - 1, 100])
def test_forced_tokens_take_no_step_of_their_own_and_change_no_token(
    loaded: tuple[Model, Tokenizer], monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    model, tokenizer = loaded
    prompt, passes = [5 + n % 300 for n in range(length)], record_passes(monkeypatch)

    def steps(mask: Constraint | OneByOne) -> list[tuple[int, mx.array]]:
        passes.clear()
        return list(generate_step(prompt, model, max_tokens=60, logits_mask=mask))

    fast = steps(Constraint(json_schema(CITY), tokenizer, 512, 60))
    assert len(passes) < 50 and max(passes[1:]) > 5
    slow = steps(OneByOne(Constraint(json_schema(CITY), tokenizer, 512, 60)))
    assert len(passes) == 60
    assert [token for token, _ in fast] == [token for token, _ in slow]
    for (_, ours), (_, theirs) in zip(fast, slow, strict=True):
        assert mx.allclose(mx.exp(ours), mx.exp(theirs), atol=1e-4)
    assert len(fast) == 60


def test_forced_tokens_are_cached_and_counted(loaded: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = loaded
    cache = model.make_cache()
    constraint = Constraint(tool_calls([{"name": "now"}], "now"), tokenizer, 512)
    events = list(stream_generate(model, tokenizer, [5, 6], cache=cache, logits_mask=constraint))
    assert "".join(event.text for event in events) == '<|tool_call|>[{"name": "now", "arguments": {}}]<|/tool_call|>'
    assert [event.generation_tokens for event in events] == list(range(1, len(events) + 1))
    assert events[-1].finish_reason == "stop" and events[-1].token in tokenizer.eos_ids
    assert cache.ids[0].tolist()[: len(events) + 1] == [5, 6, *[event.token for event in events[:-1]]]
    assert events[3].logprobs[events[3].token].item() == 0


def test_forced_tokens_end_at_max_tokens(loaded: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = loaded
    for most in (1, 2, 7):
        constraint = Constraint(tool_calls([{"name": "now"}], "now"), tokenizer, 512)
        events = list(stream_generate(model, tokenizer, [5], max_tokens=most, logits_mask=constraint))
        assert len(events) == most and events[-1].finish_reason == "length"
        constraint = Constraint(tool_calls([{"name": "now"}], "now"), tokenizer, 512)
        assert len(decoded(model, [5], most, logits_mask=constraint)) == most


def test_a_mask_is_applied_after_the_processors_and_before_the_sampler(tiny_model: TinyModel) -> None:
    class Only:
        def mask(self) -> mx.array:
            return mx.arange(512) < 100

        def accept(self, token: int) -> list[int]:
            assert token < 100
            return []

    biased = make_logits_processors({7: 500.0, 300: 1000.0})
    assert decoded(tiny_model(), [1], 3, logits_processors=biased, logits_mask=Only()) == [7, 7, 7]
    tokens = decoded(tiny_model(), [1], 40, sampler=make_sampler(50.0, seed=1), logits_mask=Only())
    assert len(set(tokens)) > 20 and max(tokens) < 100


def test_a_mask_may_allow_all_tokens_and_refuse_the_drawn_one(tiny_model: TinyModel) -> None:
    offered: list[int] = []

    class RefusingMask:
        """Refuses every first token, masks it, and forces 3 after the second one."""

        refused: int | None = None

        def mask(self) -> mx.array | None:
            return None if self.refused is None else mx.arange(512) != self.refused

        def accept(self, token: int) -> list[int] | None:
            offered.append(token)
            if self.refused is None:
                self.refused = token
                return None
            self.refused = None
            return [3]

    tokens = decoded(tiny_model(), [1], 6, logits_mask=RefusingMask())
    assert len(offered) == 6 and tokens == [offered[1], 3, offered[3], 3, offered[5], 3]
    assert all(refused != taken for refused, taken in zip(offered[::2], offered[1::2], strict=True))


def test_a_token_outside_the_grammar_is_refused(loaded: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = loaded
    constraint = Constraint(json_schema(CITY), tokenizer, 512)
    with pytest.raises(RequestError, match="cannot follow its grammar"):
        decoded(model, [1], 256, sampler=lambda logprobs: mx.array([9]), logits_mask=constraint)


@dataclass
class Place:
    city: str
    tags: list[str]
    area: float | None = None


class Pydantic:
    """A class with the interface of a pydantic model."""

    def __init__(self, **fields: Any):
        self.fields = fields

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return CITY

    @classmethod
    def model_validate_json(cls, text: str) -> Pydantic:
        return cls(**json.loads(text))


def test_generate_returns_answers_that_follow_a_schema(loaded: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = loaded
    for seed in range(5):
        options: dict[str, Any] = {"max_tokens": 60, "sampler": make_sampler(1.0, seed=seed)}
        answer = json.loads(generate(model, tokenizer, "hi", schema=CITY, **options))
        assert list(answer) == ["city", "population"] and answer["population"] <= 99_999
        place = generate(model, tokenizer, "hi", schema=Place, **options)
        assert isinstance(place, Place) and isinstance(place.city, str) and isinstance(place.tags, list)
        assert place.area is None or isinstance(place.area, float)
        assert list(generate(model, tokenizer, "hi", schema=Pydantic, **options).fields) == ["city", "population"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": CITY, "max_tokens": 3}, "had not ended after max_tokens 3; raise max_tokens"),
        ({"schema": CITY, "max_tokens": 0}, "max_tokens must be a whole number"),
        ({"schema": CITY, "stop": "x"}, "schema and stop"),
        ({"schema": CITY, "logits_mask": 5}, "schema and logits_mask"),
        ({"schema": {"not": CITY}}, "'not'"),
        ({"schema": int}, "a JSON schema, a dataclass or a pydantic model"),
        ({"schema": Place("a", [])}, "a JSON schema, a dataclass or a pydantic model"),
    ],
)
def test_a_schema_that_cannot_be_answered_is_refused(
    loaded: tuple[Model, Tokenizer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        generate(*loaded, "hi", **options)


def test_an_end_that_max_tokens_forces_is_told(loaded: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = loaded

    def said(max_tokens: int, limit: int | None) -> tuple[str, GenerationResponse]:
        mask = Constraint(json_schema(CITY), tokenizer, model.config.vocab_size, limit)
        options: dict[str, Any] = {"max_tokens": max_tokens, "sampler": make_sampler(1.0, seed=1), "logits_mask": mask}
        responses = list(stream_generate(model, tokenizer, "hi", **options))
        assert responses[-1].forced == mask.forced
        return "".join(each.text for each in responses), responses[-1]

    whole, last = said(900, None)
    assert (last.finish_reason, last.forced) == ("stop", False)
    for limit in [*range(20, last.generation_tokens, 3), last.generation_tokens + 20]:
        text, end = said(limit, limit)
        assert json.loads(text) and (end.finish_reason == "stop") == (not end.forced) == (text == whole), limit
    with pytest.warns(UserWarning, match="brought to its end by max_tokens 20"):
        assert generate(model, tokenizer, "hi", schema=CITY, max_tokens=20, sampler=make_sampler(1.0, seed=1)) != whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, tokenizer, "hi", schema=CITY, max_tokens=900, sampler=make_sampler(1.0, seed=1)) == whole


def test_a_block_that_is_used_twice_computes_all_rows_the_first_time(tiny_model: TinyModel) -> None:
    model, ids = tiny_model(), mx.arange(20)[None]
    model.model.layers[0] = model.layers[1]
    assert close(model.hidden(ids, model.make_cache(), rows=2), model.hidden(ids)[:, -2:], 1e-5)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("cached", [0, 25])
def test_the_last_hidden_states_alone_equal_those_of_a_whole_pass(
    tiny_model: TinyModel, rows: int, cached: int
) -> None:
    model, ids = tiny_model(), random_ids(65)
    whole, part = model.make_cache(), model.make_cache()
    for cache in (whole, part):
        if cached:
            model(ids[:, :cached], cache)
    expected = model.hidden(ids[:, cached:], whole)[:, -rows:]
    assert close(model.hidden(ids[:, cached:], part, rows=rows), expected, 1e-5)
    for one, other in zip(whole, part, strict=True):
        assert all(map(mx.array_equal, one.state, other.state))

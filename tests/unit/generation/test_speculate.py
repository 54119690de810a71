"""Guesses change how many passes an answer takes, and nothing else."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx import load, make_logits_processors, make_sampler
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.speculate import MAX_GUESSES, DraftModel, Pace, PromptLookup, make_proposer
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.generation.stream import stream_generate
from phi4_mlx.grammar.constraint import Constraint
from phi4_mlx.grammar.grammars import json_schema
from phi4_mlx.models.text import Model


class Oracle:
    """Always guesses: what a list says comes next, with every `wrong`th guess spoiled."""

    def __init__(self, answer: Sequence[int], wrong: int = 0, most: int = 5):
        self.answer, self.wrong, self.most = list(answer), wrong, most
        self.passes = self.at = 0

    def begin(self, ids: Sequence[int]) -> None:
        self.at = 0

    def extend(self, tokens: Sequence[int]) -> None:
        self.at += len(tokens)

    def took(self, tokens: int, seconds: float) -> None:
        assert seconds > 0
        self.passes += 1

    def pays(self) -> bool:
        return True

    def guess(self, most: int) -> list[int]:
        guesses = self.answer[self.at : self.at + min(most, self.most)]
        return [
            (each + 1) % 512 if self.wrong and (self.at + n) % self.wrong == 0 else each
            for n, each in enumerate(guesses)
        ]


def tokens(model: Model, prompt: list[int], n: int, **options: Any) -> list[int]:
    return [token for token, _ in generate_step(prompt, model, max_tokens=n, **options)]


@pytest.fixture(scope="module")
def demo() -> tuple[Model, Any]:
    return load("demo")


PROMPT = [5, 6, 7, 8, 9, 10, 5, 6, 7]


@pytest.mark.parametrize("wrong", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("kv_bits", [None, 4])
def test_the_same_tokens_whatever_is_guessed(tiny_model: Callable[..., Model], wrong: int, kv_bits: int | None) -> None:
    model = tiny_model(hidden_size=192)
    plain = tokens(model, PROMPT, 60, kv_bits=kv_bits)
    oracle = Oracle(plain, wrong)
    cache = model.make_cache(kv_bits=kv_bits)
    assert tokens(model, PROMPT, 60, cache=cache, proposer=oracle) == plain
    assert cache.ids[0].tolist() == [*PROMPT, *plain][: cache.offset] and cache.offset >= len(PROMPT) + 58
    assert oracle.passes <= (12 if wrong == 0 else 60)


@pytest.mark.parametrize("boundary", [12, 13, 16, 17, 18, 19, 20, 30])
def test_the_same_tokens_across_the_rope_boundary(tiny_model: Callable[..., Model], boundary: int) -> None:
    model = tiny_model(original_max_position_embeddings=boundary)
    plain = tokens(model, PROMPT, 40)
    cache = model.make_cache()
    assert tokens(model, PROMPT, 40, proposer=Oracle(plain), cache=cache) == plain
    assert cache.rerun_tokens <= boundary  # once


def test_the_same_tokens_on_the_demo(demo: tuple[Model, Any]) -> None:
    model, tokenizer = demo
    text = "Repeat this: The mill stands by the river, and the river runs to the sea. The mill stands by the river."
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    plain = tokens(model, prompt, 120)
    for timed in (False, True):
        assert tokens(model, prompt, 120, proposer=PromptLookup(timed)) == plain


def test_processors_see_the_tokens_before_each_guess(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    options = {"logits_processors": make_logits_processors(frequency_penalty=1.5, frequency_context_size=30)}
    plain = tokens(model, PROMPT, 50, **options)
    assert len(set(plain)) > 10
    for wrong in (0, 3):
        assert tokens(model, PROMPT, 50, proposer=Oracle(plain, wrong), **options) == plain


@pytest.mark.parametrize("penalty", ["none", "repetition_penalty", "presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("prefill_step_size", [2, 2048])
def test_under_a_grammar(demo: tuple[Model, Any], penalty: str, prefill_step_size: int) -> None:
    model, tokenizer = demo
    processors = [] if penalty == "none" else make_logits_processors(**{penalty: 1.5})
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "kind": {"enum": ["river", "mill"]}, "n": {"type": "integer"}},
        "required": ["name", "kind", "n"],
        "additionalProperties": False,
    }
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Put into JSON: the mill is number 12."}])

    def answer(proposer: Any) -> tuple[list[int], int]:
        mask = Constraint(json_schema(schema), tokenizer, model.config.vocab_size, 80)
        cache = model.make_cache()
        options = {"logits_mask": mask, "logits_processors": processors, "prefill_step_size": prefill_step_size}
        events = stream_generate(model, tokenizer, prompt, max_tokens=80, proposer=proposer, cache=cache, **options)
        drawn = [event.token for event in events]
        assert mask.complete
        return drawn, cache.offset

    plain, _ = answer(None)
    for wrong in (0, 2, 5):
        guessed, held = answer(Oracle(plain, wrong))
        assert guessed == plain and len(prompt) < held <= len(prompt) + len(plain) + 1 + 5  # a pass more, with guesses
    assert answer(PromptLookup(timed=False))[0] == plain
    assert answer(DraftModel(model, timed=False))[0] == plain


@pytest.mark.slow
@pytest.mark.parametrize("guess", ["likely", "unlikely"])
def test_the_distribution_stays(tiny_model: Callable[..., Model], guess: str) -> None:
    """Third tokens of many answers at temperature 1, with and without guesses: the same frequencies, by chi squared."""
    model, n = tiny_model(), 1500
    sampler = make_sampler(temp=1.0, top_k=6, seed=3)
    likeliest = tokens(model, PROMPT, 3)
    guesses = likeliest if guess == "likely" else [(each + 9) % 512 for each in likeliest]
    start = model.make_cache()
    mx.eval(model(mx.array([PROMPT[:-1]]), start))

    def frequencies(proposer: Any) -> Counter[int]:
        counts: Counter[int] = Counter()
        for _ in range(n):
            start.reuse(PROMPT)
            counts[tokens(model, PROMPT[-1:], 3, cache=start, sampler=sampler, proposer=proposer)[2]] += 1
        return counts

    plain, guessed = frequencies(None), frequencies(Oracle(guesses))
    common = [token for token in plain | guessed if plain[token] + guessed[token] >= 10]
    expected = np.array([[plain[each], guessed[each]] for each in common], float)
    mean = expected.mean(axis=1, keepdims=True)
    chi_squared = float(((expected - mean) ** 2 / mean).sum())
    freedom = len(common) - 1
    assert freedom >= 3 and chi_squared < freedom + 4 * (2 * freedom) ** 0.5


def test_fewer_passes_where_a_text_repeats_itself(tiny_model: Callable[..., Model]) -> None:
    model, passage = tiny_model(), [random.Random(1).randrange(3, 512) for _ in range(100)]

    def script(ids: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, passage[ids.shape[0] - len(passage)]].add(1e4)

    lookup = PromptLookup(timed=False)
    counts: list[int] = []
    lookup.took = lambda tokens, seconds: counts.append(tokens)  # type: ignore[method-assign]
    assert tokens(model, passage, 100, logits_processors=[script], proposer=lookup) == passage
    assert len(counts) <= 20


def test_a_lookup_guesses_what_followed_the_longest_match() -> None:
    lookup = PromptLookup(timed=False)
    lookup.begin([1, 2, 3, 4, 50, 51, 52, 9, 9, 3, 4, 60, 61, 62, 1, 2, 3, 4])
    assert lookup._source == 4  # after 1 2 3 4, not after 3 4
    for token in [50, 51, 52]:
        lookup.extend([token])
    assert lookup.guess(2) == [9, 9]


def test_a_lookup_goes_round_in_a_text_that_does() -> None:
    lookup = PromptLookup(timed=False)
    lookup.begin([1, 2, 3] * 6)
    assert lookup.guess(5) == [1, 2, 3, 1, 2]


def test_a_lookup_of_nothing_new_has_no_guess() -> None:
    lookup = PromptLookup(timed=False)
    lookup.begin(range(3, 300))
    assert not lookup.pays() and lookup.guess(5) == []
    lookup.begin([])
    assert not lookup.pays()


def test_a_lookup_takes_memory_in_proportion() -> None:
    draw, lookup = random.Random(2), PromptLookup()
    lookup.begin([draw.randrange(200_000) for _ in range(20_000)])
    assert len(lookup._latest) <= 20_000 and len(lookup._earlier) == len(lookup._ids) == 20_000


def test_guesses_that_fail_are_given_up_and_come_back() -> None:
    lookup = PromptLookup(timed=False)
    lookup.begin([1, 2, 3, 4, 5, 6, 7, 8] * 4)
    assert lookup.pays()
    for other in range(100, 200):  # looks alike each time, and never goes on alike
        lookup.extend([1, 2, other])
    lookup.extend([1, 2])
    assert not lookup.pays()
    for _ in range(30):
        lookup.extend([40, 41, 42, 43, 44, 45, 46, 47])
    assert lookup.pays()


def test_the_length_of_a_guess_follows_chance_and_cost() -> None:
    pace = Pace(timed=True)
    pace.took(1, 0.01)
    for _ in range(60):
        pace.took(5, 0.05)  # as long as five passes
    assert pace.length(0.99, MAX_GUESSES) == 0
    for _ in range(60):
        pace.took(5, 0.0104)
    assert pace.length(0.99, MAX_GUESSES) == MAX_GUESSES and pace.length(0.99, 3) == 3
    assert 0 < pace.length(0.6, MAX_GUESSES) < 8 and pace.length(0.02, MAX_GUESSES) == 0


def test_a_pass_that_was_held_up_does_not_count_for_long() -> None:
    pace = Pace(timed=True)
    for seconds in (0.01, 0.5, 0.011, 0.012):
        pace.took(1, seconds)
    assert pace._step_s < 0.013


def test_a_draft_model_of_the_same_weights_is_always_right(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    plain, draft = tokens(model, PROMPT, 60), DraftModel(tiny_model(), timed=False)
    counts: list[int] = []
    draft.took = lambda tokens, seconds: counts.append(tokens)  # type: ignore[method-assign]
    assert tokens(model, PROMPT, 60, proposer=draft) == plain
    assert len(counts) <= 15


def test_a_draft_model_of_other_weights_changes_nothing(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(original_max_position_embeddings=32)
    plain = tokens(model, PROMPT, 60)
    for timed in (True, False):
        draft = DraftModel(tiny_model(seed=9, original_max_position_embeddings=32), timed)
        assert tokens(model, PROMPT, 60, proposer=draft) == plain


def test_a_draft_whose_context_is_full_guesses_no_more(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    plain, draft = tokens(model, PROMPT, 60), DraftModel(tiny_model(max_position_embeddings=30), timed=False)
    assert tokens(model, PROMPT, 60, proposer=draft) == plain
    assert not draft.pays() and draft.guess(5) == []


def test_a_draft_model_with_another_vocabulary_is_refused(tiny_model: Callable[..., Model]) -> None:
    with pytest.raises(RequestError, match=r"256.*512"):
        make_proposer("auto", tiny_model(), tiny_model(vocab_size=256))


def test_when_there_are_no_guesses(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    assert make_proposer("off", model) is None
    assert make_proposer("auto", model, seeded=True) is None and make_proposer("auto", model, rewindable=False) is None
    draft = make_proposer("auto", model, tiny_model(seed=1), seeded=True)  # that was asked for, and needs no clock
    assert isinstance(draft, DraftModel) and not draft.pace.timed
    lookup = make_proposer("lookup", model, seeded=True)
    assert isinstance(lookup, PromptLookup) and not lookup.pace.timed
    with pytest.raises(RequestError, match="max_kv_size"):
        generate_step(PROMPT, model, max_kv_size=512, proposer=PromptLookup())

"""Speculative decoding: guesses change the number of forward passes, not the tokens."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx import make_logits_processors, make_sampler
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.speculate import FORGET, MAX_GUESSES, DraftModel, Pace, PromptLookup, make_proposer
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.generation.stream import stream_generate
from phi4_mlx.grammar.constraint import Constraint
from phi4_mlx.grammar.grammars import json_schema
from phi4_mlx.models.cache import REWIND
from phi4_mlx.models.model import LanguageModel
from tests.conftest import Demo, TinyModel
from tests.kinds import MAKERS
from tests.model_runs import decoded, filled_cache


class Oracle:
    """A proposer that guesses the next tokens of a known answer; every `wrong`th guess is false, 0 for none."""

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
        guesses = self.answer[self.at : self.at + self.most]
        return [
            (each + 1) % 512 if self.wrong and (self.at + n) % self.wrong == 0 else each
            for n, each in enumerate(guesses)
        ]


def count_passes(proposer: PromptLookup | DraftModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the tokens of each forward pass that the proposer hears of."""
    passes: list[int] = []
    monkeypatch.setattr(proposer, "took", lambda tokens, seconds: passes.append(tokens))
    return passes


PROMPT = [5, 6, 7, 8, 9, 10, 5, 6, 7]


@pytest.mark.parametrize("wrong", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("kv_bits", [None, 4])
def test_true_and_false_guesses_give_the_same_tokens(tiny_model: TinyModel, wrong: int, kv_bits: int | None) -> None:
    model = tiny_model(hidden_size=192)
    plain = decoded(model, PROMPT, 60, kv_bits=kv_bits)
    oracle = Oracle(plain, wrong)
    cache = model.make_cache(kv_bits=kv_bits)
    assert decoded(model, PROMPT, 60, cache=cache, proposer=oracle) == plain
    assert cache.ids[0].tolist() == [*PROMPT, *plain][: cache.offset] and cache.offset >= len(PROMPT) + 58
    assert oracle.passes <= (12 if wrong == 0 else 60)


class ForcingMask:
    """A grammar that allows any token, and forces the given ones after every third."""

    def __init__(self, forced: list[int]):
        self.forced, self.count = forced, 0

    def mask(self) -> mx.array | None:
        return None

    def accept(self, token: int) -> list[int]:
        self.count += 1
        return [] if self.count % 3 else self.forced


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("run", [0, REWIND - 3, REWIND + 8])
def test_wrong_guesses_after_a_run_of_forced_tokens_are_taken_back(make: Callable[[], LanguageModel], run: int) -> None:
    """Also where a proposer guesses more tokens than a cache could take back."""
    model, forced = make(), list(range(100, 100 + run))
    plain = decoded(model, PROMPT, 60, logits_mask=ForcingMask(forced))
    for wrong in (0, 2):
        guessing = Oracle(plain, wrong, most=REWIND + 8)
        assert decoded(model, PROMPT, 60, logits_mask=ForcingMask(forced), proposer=guessing) == plain
    if not run:
        assert decoded(model, PROMPT, 60, proposer=Oracle(plain, 2, most=REWIND + 8)) == plain


@pytest.mark.parametrize("boundary", [12, 13, 16, 17, 18, 19, 20, 30])
def test_guesses_across_the_rope_boundary_give_the_same_tokens(tiny_model: TinyModel, boundary: int) -> None:
    model = tiny_model(original_max_position_embeddings=boundary)
    plain = decoded(model, PROMPT, 40)
    cache = model.make_cache()
    assert decoded(model, PROMPT, 40, proposer=Oracle(plain), cache=cache) == plain
    assert cache.rerun_tokens <= boundary  # one crossing


def test_a_lookup_gives_the_same_tokens_on_the_demo(demo: Demo) -> None:
    model, tokenizer = demo
    text = "Repeat this: The mill stands by the river, and the river runs to the sea. The mill stands by the river."
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    plain = decoded(model, prompt, 120)
    for timed in (False, True):
        assert decoded(model, prompt, 120, proposer=PromptLookup(timed)) == plain


def test_processors_receive_the_tokens_before_each_guess(tiny_model: TinyModel) -> None:
    model = tiny_model()
    options = {"logits_processors": make_logits_processors(frequency_penalty=1.5, frequency_context_size=30)}
    plain = decoded(model, PROMPT, 50, **options)
    assert len(set(plain)) > 10
    for wrong in (0, 3):
        assert decoded(model, PROMPT, 50, proposer=Oracle(plain, wrong), **options) == plain


@pytest.mark.slow
@pytest.mark.parametrize("penalty", ["none", "repetition_penalty", "presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("prefill_step_size", [2, 2048])
def test_guesses_under_a_grammar_give_the_same_tokens(demo: Demo, penalty: str, prefill_step_size: int) -> None:
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
        tokens = [event.token for event in events]
        assert mask.complete
        return tokens, cache.offset

    plain, _ = answer(None)
    for wrong in (0, 2, 5):
        guessed, cached = answer(Oracle(plain, wrong))
        longest = len(prompt) + len(plain) + 1 + 5  # the cache may be one pass of a token and five guesses ahead
        assert guessed == plain and len(prompt) < cached <= longest
    assert answer(PromptLookup(timed=False))[0] == plain
    assert answer(DraftModel(model, timed=False))[0] == plain


@pytest.mark.slow
@pytest.mark.parametrize("guess", ["likely", "unlikely"])
def test_guesses_do_not_change_the_distribution(tiny_model: TinyModel, guess: str) -> None:
    """Compares the third tokens of many answers at temperature 1 with and without guesses by chi-squared."""
    model, n = tiny_model(), 1500
    sampler = make_sampler(temp=1.0, top_k=6, seed=3)
    likeliest = decoded(model, PROMPT, 3)
    guesses = likeliest if guess == "likely" else [(each + 9) % 512 for each in likeliest]
    start = filled_cache(model, mx.array([PROMPT[:-1]]))

    def frequencies(proposer: Any) -> Counter[int]:
        counts: Counter[int] = Counter()
        for _ in range(n):
            start.reuse(PROMPT)
            counts[decoded(model, PROMPT[-1:], 3, cache=start, sampler=sampler, proposer=proposer)[2]] += 1
        return counts

    plain, guessed = frequencies(None), frequencies(Oracle(guesses))
    common = [token for token in plain | guessed if plain[token] + guessed[token] >= 10]
    expected = np.array([[plain[each], guessed[each]] for each in common], float)
    mean = expected.mean(axis=1, keepdims=True)
    chi_squared = float(((expected - mean) ** 2 / mean).sum())
    freedom = len(common) - 1
    assert freedom >= 3 and chi_squared < freedom + 4 * (2 * freedom) ** 0.5


def test_a_lookup_saves_passes_where_a_text_repeats_itself(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, passage = tiny_model(), [random.Random(1).randrange(3, 512) for _ in range(100)]

    def script(ids: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, passage[ids.shape[0] - len(passage)]].add(1e4)

    lookup = PromptLookup(timed=False)
    passes = count_passes(lookup, monkeypatch)
    assert decoded(model, passage, 100, logits_processors=[script], proposer=lookup) == passage
    assert 0 < len(passes) <= 20


def test_a_lookup_guesses_what_followed_the_longest_match() -> None:
    lookup = PromptLookup(timed=False)
    lookup.begin([1, 2, 3, 4, 50, 51, 52, 9, 9, 3, 4, 60, 61, 62, 1, 2, 3, 4])
    assert lookup.guess(2) == [50, 51]  # after 1 2 3 4; after 3 4 it would be 60 61
    for token in [50, 51, 52]:
        lookup.extend([token])
    assert lookup.guess(2) == [9, 9]


def test_a_lookup_continues_a_periodic_text_past_its_end() -> None:
    lookup = PromptLookup(timed=False)
    lookup.begin([1, 2, 3] * 6)
    assert lookup.guess(5) == [1, 2, 3, 1, 2]


def test_a_lookup_without_a_repetition_has_no_guess() -> None:
    lookup = PromptLookup(timed=False)
    lookup.begin(range(3, 300))
    assert not lookup.pays() and lookup.guess(5) == []
    lookup.begin([])
    assert not lookup.pays()


def test_the_memory_of_a_lookup_is_proportional_to_the_length() -> None:
    def size(n: int) -> int:
        draw, lookup = random.Random(2), PromptLookup()
        ids = [draw.randrange(200_000) for _ in range(n)]
        tracemalloc.start()
        lookup.begin(ids)
        bytes_held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return bytes_held

    assert 0 < size(40_000) < 5 * size(10_000)


def test_a_lookup_stops_guessing_where_guesses_fail_and_starts_again_where_they_hold() -> None:
    lookup = PromptLookup(timed=False)
    lookup.begin([1, 2, 3, 4, 5, 6, 7, 8] * 4)
    assert lookup.pays()
    for other in range(100, 200):  # 1 2 repeats, and another token follows it each time
        lookup.extend([1, 2, other])
    lookup.extend([1, 2])
    assert not lookup.pays()
    for _ in range(30):
        lookup.extend([40, 41, 42, 43, 44, 45, 46, 47])
    assert lookup.pays()


def test_the_length_of_a_guess_depends_on_its_chance_and_cost() -> None:
    pace = Pace(timed=True)
    pace.took(1, 0.01)
    for _ in range(60):
        pace.took(5, 0.05)  # costs as much as five passes
    assert pace.length(0.99, MAX_GUESSES) == 0
    for _ in range(60):
        pace.took(5, 0.0104)
    assert pace.length(0.99, MAX_GUESSES) == MAX_GUESSES and pace.length(0.99, 3) == 3
    assert 0 < pace.length(0.6, MAX_GUESSES) < 8 and pace.length(0.02, MAX_GUESSES) == 0


def test_one_delayed_pass_does_not_make_guesses_look_cheap() -> None:
    pace = Pace(timed=True)
    for seconds in (0.01, 0.5, 0.011, 0.012):
        pace.took(1, seconds)
    for _ in range(60):
        pace.took(5, 0.06)  # costs as much as five passes of 0.012 s, and would be cheap beside one of 0.5 s
    assert pace.length(0.99, MAX_GUESSES) == 0


def test_a_high_cost_is_forgotten_after_many_passes_without_a_guess() -> None:
    pace = Pace(timed=True)
    assert not pace.known
    pace.took(1, 0.01)
    assert pace.known
    for _ in range(60):
        pace.took(5, 0.05)
    for _ in range(FORGET - 1):
        pace.took(1, 0.01)
        assert pace.length(0.9, MAX_GUESSES) == 0
    pace.took(1, 0.01)
    assert pace.length(0.9, MAX_GUESSES) > 0


def test_rows_that_share_a_pass_guess_where_all_of_them_gain() -> None:
    pace, sure = Pace(timed=False), [1.0] * MAX_GUESSES  # a further column costs a tenth of a pass
    assert pace.further([sure], MAX_GUESSES) == MAX_GUESSES
    assert pace.further([sure, []], MAX_GUESSES) == MAX_GUESSES
    assert pace.further([sure, *[[]] * 19], MAX_GUESSES) == 0  # 21 tokens in 1.1 passes
    assert pace.further([sure, [1.0] * 3], 2) == 2
    assert pace.further([sure[:3], *[[]] * 4], MAX_GUESSES) == 3
    assert pace.further([[], []], MAX_GUESSES) == 0


def test_guesses_of_a_draft_model_with_the_same_weights_hold(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    plain, draft = decoded(model, PROMPT, 60), DraftModel(tiny_model(), timed=False)
    passes = count_passes(draft, monkeypatch)
    assert decoded(model, PROMPT, 60, proposer=draft) == plain
    assert 0 < len(passes) <= 15


def test_a_draft_model_with_other_weights_gives_the_same_tokens(tiny_model: TinyModel) -> None:
    model = tiny_model(original_max_position_embeddings=32)
    plain = decoded(model, PROMPT, 60)
    for timed in (True, False):
        draft = DraftModel(tiny_model(seed=9, original_max_position_embeddings=32), timed)
        assert decoded(model, PROMPT, 60, proposer=draft) == plain


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("draft", MAKERS.values(), ids=MAKERS)
def test_a_draft_model_may_be_of_another_kind(
    make: Callable[..., LanguageModel], draft: Callable[..., LanguageModel]
) -> None:
    model = make()
    plain = decoded(model, PROMPT, 40)
    for seed in (0, 9):  # the same weights where the kinds are the same, and others
        assert decoded(model, PROMPT, 40, proposer=DraftModel(draft(seed=seed), timed=False)) == plain


def test_a_draft_model_whose_context_is_full_stops_guessing(tiny_model: TinyModel) -> None:
    model = tiny_model()
    plain, draft = decoded(model, PROMPT, 60), DraftModel(tiny_model(max_position_embeddings=30), timed=False)
    assert decoded(model, PROMPT, 60, proposer=draft) == plain
    assert not draft.pays() and draft.guess(5) == []


def test_a_draft_model_with_another_vocabulary_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(RequestError, match=r"256.*512"):
        make_proposer("auto", tiny_model(), tiny_model(vocab_size=256))


def test_the_proposer_depends_on_mode_seed_and_cache(tiny_model: TinyModel) -> None:
    model = tiny_model()
    assert make_proposer("off", model) is None
    assert make_proposer("auto", model, seeded=True) is None and make_proposer("auto", model, rewindable=False) is None
    draft = make_proposer("auto", model, tiny_model(seed=1), seeded=True)  # with a seed it must not measure times
    assert isinstance(draft, DraftModel) and not draft.pace.timed
    lookup = make_proposer("lookup", model, seeded=True)
    assert isinstance(lookup, PromptLookup) and not lookup.pace.timed
    with pytest.raises(RequestError, match="max_kv_size"):
        generate_step(PROMPT, model, max_kv_size=512, proposer=PromptLookup())

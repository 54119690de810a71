"""Generation with a leader's model: the same tokens as without ranks, and a follower that is never out of step."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.guessing import Guessing
from phi4_mlx.generation.sampling import make_sampler
from phi4_mlx.generation.sequence import BatchSequence
from phi4_mlx.generation.speculate import PromptLookup
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.cache import KVCache
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.ranks.follower import OutOfStep
from phi4_mlx.server.engine.prefix_cache import PrefixCache
from tests.conftest import BOUNDARY, make_tiny_model
from tests.kinds import MAKERS
from tests.media import clip, picture, prompt_of
from tests.mirrored import Ended, Pair

PROMPT = [5, 9, 11, 5, 9, 11, 7, 5, 9]


def answer(model: LanguageModel, prompt: list[int] = PROMPT, max_tokens: int = 12, **options: Any) -> list[int]:
    return [token for token, _ in generate_step(prompt, model, max_tokens=max_tokens, **options)]


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Any:
    return lambda: MAKERS[request.param](seed=3)


@pytest.mark.parametrize("splits_head", [False, True])
@pytest.mark.parametrize("options", [{}, {"sampler": 1}, {"proposer": 1}], ids=["greedy", "seeded", "lookup"])
def test_answers_are_those_of_one_process(make: Any, options: dict[str, Any], splits_head: bool) -> None:
    def given() -> dict[str, Any]:
        made = {"sampler": lambda: make_sampler(0.8, seed=7), "proposer": lambda: PromptLookup(timed=False)}
        return {name: made[name]() for name in options}

    pair = Pair(make, splits_head=splits_head)
    prompt = PROMPT * (BOUNDARY // len(PROMPT))  # the answer crosses the RoPE boundary
    assert answer(pair.model, prompt, **given()) == answer(make(), prompt, **given())
    pair.flush()
    assert not pair.follower.held, "a cache that the leader has freed is still held"


def test_media_are_read_on_the_leader_alone() -> None:
    def make() -> LanguageModel:
        return MAKERS["phi4mm"](seed=3)

    pair, prompt = Pair(make), prompt_of([1, 5], picture(), [9, 9], clip(), [4])
    assert answer(pair.model, prompt) == answer(make(), prompt)


def test_a_decode_step_is_one_message(make: Any) -> None:
    pair = Pair(make, splits_head=True)
    answer(pair.model, max_tokens=12)
    assert all("ids" in command and command["read"] for command in pair.commands[-10:])


class Store:
    """The prefix cache of a batch, as the server's engine has it."""

    def __init__(self) -> None:
        self.prefixes = PrefixCache(2**30)

    def recall(self, sequence: BatchSequence) -> Any:
        return self.prefixes.find(sequence.model, None, sequence.ids)

    def keep(self, sequence: BatchSequence) -> None:
        assert sequence.cache is not None
        self.prefixes.put(sequence.model, None, sequence.cache)


def batched(model: LanguageModel, lookup: bool = False, temp: float = 0.0) -> list[list[int]]:
    """The answers to eight prompts, some with a common beginning, four at a time."""
    batch, common = Batch(4, prefixes=Store(), prefill_step_size=32, guessing=Guessing(timed=False)), [7, 8, 9] * 12
    sequences = [BatchSequence(model, [*common[: 12 * (n % 4)], n, n + 1], 10 + n, last_turn=12) for n in range(8)]
    for sequence in sequences:
        sequence.proposer = PromptLookup() if lookup else None
        sequence.sampler = make_sampler(temp, seed=len(sequence.ids)) if temp else None
    for sequence in sequences:
        batch.add(sequence)
    while batch.waiting or batch.active:
        for event in batch.step():
            assert hasattr(event, "token"), event
            if event.sequence.drawn >= event.sequence.max_tokens and event.sequence in batch.active:
                batch.end(event.sequence)
    assert (batch.guessing.guessed > batch.guessing.held) is lookup
    return [sequence.ids for sequence in sequences]


def test_guesses_in_a_batch_are_taken_back_on_every_rank() -> None:
    pair = Pair(make_tiny_model)
    assert batched(pair.model, lookup=True) == batched(make_tiny_model())


def test_rows_that_come_and_go_are_drawn_at_their_own_temperatures() -> None:
    pair = Pair(make_tiny_model, splits_head=True)
    assert batched(pair.model, temp=0.8) == batched(make_tiny_model(), temp=0.8)


def test_sums_within_a_pass_find_the_followers_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(make_tiny_model, splits_head=True)
    told, run = [], type(pair.model.model).__call__

    def look(self: Any, *arguments: Any, **options: Any) -> mx.array:
        told.append(len(pair.commands))
        found: mx.array = run(self, *arguments, **options)
        return found

    monkeypatch.setattr(type(pair.model.model), "__call__", look)
    pair.model.hidden(mx.array([PROMPT]), pair.model.make_cache())  # attention may wait for a part of a long chunk
    assert told == [1]


@pytest.mark.parametrize("splits_head", [False, True])
def test_a_batch_with_a_prefix_cache_answers_as_one_process(make: Any, splits_head: bool) -> None:
    pair = Pair(make, splits_head=splits_head)
    assert batched(pair.model) == batched(make())
    gc.collect()
    pair.flush()
    assert not pair.follower.held


def test_a_follower_one_operation_off_is_refused_before_it_computes() -> None:
    pair = Pair(make_tiny_model)
    pair.follower.counter -= 1
    with pytest.raises(OutOfStep, match="operation 1 came after operation -1"):
        answer(pair.model)
    assert pair.follower.counter == -1


@pytest.mark.parametrize("fault", ["token", "length"])
def test_a_follower_whose_cache_is_one_token_off_is_refused(fault: str) -> None:
    pair = Pair(make_tiny_model)
    cache = pair.model.make_cache()
    pair.model(mx.array([PROMPT]), cache)
    (held,) = pair.follower.held.values()
    if fault == "length":
        held.cache.trim(1)
        held.digest.cut(len(PROMPT) - 1)
    else:
        held.digest.cut(0)
        held.digest.append([*PROMPT[:-1], 100])
    with pytest.raises(OutOfStep, match="goes on from 9 tokens"):
        pair.model(mx.array([[3, 4]]), cache)


def test_a_cache_that_a_follower_does_not_have_is_refused() -> None:
    pair = Pair(make_tiny_model)
    cache = pair.model.make_cache()
    pair.model(mx.array([PROMPT]), cache)
    pair.follower.held.clear()
    with pytest.raises(OutOfStep, match="operation 2 goes on from cache 1, which is not here"):
        pair.model(mx.array([[3]]), cache)
    assert pair.follower.counter == 1


def test_a_cache_from_elsewhere_is_refused() -> None:
    pair, other = Pair(make_tiny_model), make_tiny_model()
    with pytest.raises(RequestError, match=r"make it with model.make_cache\(\)"):
        pair.model(mx.array([[1]]), [KVCache() for _ in pair.model.layers])
    with pytest.raises(RequestError, match=r"make it with model.make_cache\(\)"):
        answer(pair.model, cache=other.make_cache())
    cache = other.make_cache()
    other(mx.array([PROMPT]), cache)
    with pytest.raises(RequestError, match="cannot take states from elsewhere"):
        pair.model.make_cache().restore(PROMPT, [layer.state for layer in cache], "short")


def test_other_hidden_states_than_the_last_are_handed_over_first() -> None:
    pair = Pair(make_tiny_model, splits_head=True)
    first = pair.model.hidden(mx.array([PROMPT]))
    logits = pair.model.logits(first)
    assert "shape" in pair.commands[-1] and pair.commands[-1]["shape"] is None
    pair.model.hidden(mx.array([[3]]))
    assert mx.array_equal(pair.model.logits(first), logits)
    assert pair.commands[-1]["shape"] == [1, len(PROMPT), first.shape[-1]]


def test_a_failure_of_the_leader_after_it_has_told_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(make_tiny_model)
    cache = pair.model.make_cache()
    pair.model(mx.array([PROMPT]), cache)

    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(type(pair.model.model), "__call__", fail)
    with pytest.raises(Ended, match="rank 0 failed in operation 2: ValueError: planted"):
        pair.model(mx.array([[3]]), cache)
    with pytest.raises(Ended, match="rank 0 failed in operation 3: ValueError: planted"):
        pair.model(mx.array([[3, 4]]), cache)


@pytest.mark.parametrize("splits_head", [False, True])
def test_a_pass_that_is_refused_is_not_told(splits_head: bool) -> None:
    pair = Pair(make_tiny_model, splits_head=splits_head)
    cache = pair.model.make_cache()
    cache.adapter = "none"
    with pytest.raises(RequestError, match="none"):
        pair.model(mx.array([[3, 4]]), cache)
    assert not pair.commands

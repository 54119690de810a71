"""Sequences in a batch: each is answered as it would be alone, whatever the others do."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.generation import batch as batch_module
from phi4_mlx.generation.batch import Batch, BatchSequence, Fault, Token
from phi4_mlx.generation.sampling import make_logits_processors, make_sampler
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.text import Model
from tests.conftest import BOUNDARY, make_tiny_model


@pytest.fixture(scope="module")
def model() -> Model:
    return make_tiny_model(seed=3)


def prompts(count: int, seed: int = 0, longest: int = 2 * BOUNDARY) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(512) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def alone(model: Model, prompt: list[int], max_tokens: int, **options: Any) -> list[int]:
    return [token for token, _ in generate_step(prompt, model, max_tokens=max_tokens, **options)]


def run(batch: Batch, each_step: Callable[[int], None] = lambda step: None) -> list[Fault]:
    """Steps until all are done; returns the faults."""
    faults, step = [], 0
    while batch.waiting or batch.active:
        each_step(step)
        for event in batch.step():
            if isinstance(event, Fault):
                faults.append(event)
            elif event.sequence.drawn >= event.sequence.max_tokens and event.sequence in batch.active:
                batch.end(event.sequence)
        step += 1
        assert step < 2000
    return faults


def drawn(sequence: BatchSequence) -> list[int]:
    return sequence.ids[sequence.prompt_tokens :]


def test_each_is_answered_as_alone_also_across_the_boundary(model: Model) -> None:
    asked = [*prompts(12), [7] * (BOUNDARY - 1), [8] * BOUNDARY, [9] * (BOUNDARY + 1), [5] * (BOUNDARY - 20)]
    sequences = [BatchSequence(model, list(prompt), 10 + n * 3) for n, prompt in enumerate(asked)]
    batch = Batch(max_rows=8, prefill_step_size=48)
    for sequence in sequences:
        batch.add(sequence)
    assert not run(batch)
    for sequence, prompt in zip(sequences, asked, strict=True):
        assert drawn(sequence) == alone(model, prompt, sequence.max_tokens)
    assert any(len(s.ids) > BOUNDARY >= s.prompt_tokens for s in sequences)  # some have crossed


def test_sequences_may_join_and_leave_at_any_step(model: Model) -> None:
    asked = prompts(10, seed=1)
    sequences = [BatchSequence(model, list(prompt), 25) for prompt in asked]
    batch, cut = Batch(), sequences[3]
    batch.add(sequences[0])

    def join_and_leave(step: int) -> None:
        if 0 < step < len(sequences):
            batch.add(sequences[step])
        if step == 12:
            batch.end(cut)

    run(batch, join_and_leave)
    for sequence, prompt in zip(sequences, asked, strict=True):
        assert drawn(sequence) == alone(model, prompt, 25)[: sequence.drawn]
        assert sequence.drawn == 25 or sequence is cut
    assert 0 < cut.drawn < 25


def test_samplers_and_processors_are_each_sequences_own(model: Model) -> None:
    asked = prompts(4, seed=2)
    batch, sequences = Batch(), []
    for n, prompt in enumerate(asked):
        sampler = make_sampler(0.9, top_p=0.9, seed=n) if n % 2 else None
        processors = make_logits_processors(repetition_penalty=1.3) if n > 1 else []
        sequences.append(BatchSequence(model, list(prompt), 20, sampler, processors))
        batch.add(sequences[-1])
    run(batch)
    for n, (sequence, prompt) in enumerate(zip(sequences, asked, strict=True)):
        options: dict[str, Any] = {"sampler": make_sampler(0.9, top_p=0.9, seed=n)} if n % 2 else {}
        if n > 1:
            options["logits_processors"] = make_logits_processors(repetition_penalty=1.3)
        assert drawn(sequence) == alone(model, prompt, 20, **options)


def test_where_keys_and_values_would_outgrow_the_limit_the_youngest_waits(model: Model) -> None:
    asked = prompts(6, seed=4, longest=60)
    limit = 3 * 256 * model.context_cost().token_bytes
    batch = Batch(kv_limit_bytes=limit)
    sequences = [BatchSequence(model, list(prompt), 300) for prompt in asked]
    for sequence in sequences:
        batch.add(sequence)
    most, under_way = 0, set()

    def look(step: int) -> None:
        nonlocal most
        most = max(most, batch.nbytes)
        assert all(sequence.cache is None for sequence in batch.waiting)  # what waits takes no memory
        under_way.add(len(batch.active))

    assert not run(batch, look)
    # The limit holds before a step, which may add a buffer to each.
    assert most <= limit + 2 * 256 * model.context_cost().token_bytes
    assert {1, 2} <= under_way  # two that have grown are too many
    for sequence, prompt in zip(sequences, asked, strict=True):
        assert drawn(sequence) == alone(model, prompt, 300)


class Script:
    """A grammar that allows any token and forces some to follow."""

    def __init__(self, forced: dict[int, list[int]]):
        self.forced, self.count = forced, 0

    def mask(self) -> mx.array | None:
        return None

    def accept(self, token: int) -> list[int]:
        self.count += 1
        return self.forced.get(self.count, [])


@pytest.mark.parametrize("length", [1, 3, 7, 8, 30])
def test_forced_tokens_are_taken_in_few_or_many(model: Model, length: int) -> None:
    prompt, forced = prompts(1, seed=5, longest=50)[0], list(range(100, 100 + length))
    masked = BatchSequence(model, list(prompt), 90, logits_mask=Script({4: forced, 9: forced}))
    beside = BatchSequence(model, [1, 2, 3], 60)
    batch = Batch()
    batch.add(masked)
    batch.add(beside)
    run(batch)
    head = alone(model, prompt, 4)
    assert drawn(masked)[: 4 + length] == head + forced
    middle = alone(model, [*prompt, *head, *forced], 5)
    assert drawn(masked)[4 + length : 9 + 2 * length] == middle + forced
    rest = alone(model, [*prompt, *head, *forced, *middle, *forced], 81 - 2 * length)
    assert drawn(masked)[9 + 2 * length :] == rest
    assert drawn(beside) == alone(model, [1, 2, 3], 60)


def test_rows_of_which_none_has_anything_to_draw_go_on(model: Model) -> None:
    sequences = [BatchSequence(model, [n, 2, 3], 12, logits_mask=Script({3: [100, 101, 102]})) for n in range(2)]
    batch = Batch()
    for sequence in sequences:
        batch.add(sequence)
    assert not run(batch)
    for n, sequence in enumerate(sequences):
        assert sequence.restarts == 0
        head = alone(model, [n, 2, 3], 3)
        assert drawn(sequence) == [*head, 100, 101, 102, *alone(model, [n, 2, 3, *head, 100, 101, 102], 6)]


class Choosy(Script):
    """A grammar that refuses the first token it is shown at every other step, and masks it from then on."""

    refused: int | None = None

    def mask(self) -> mx.array | None:
        return None if self.refused is None else mx.arange(512) != self.refused

    def accept(self, token: int) -> Any:
        if self.refused is None and self.count % 2:
            self.refused = token
            return None
        self.refused = None
        return super().accept(token)


def test_a_grammar_may_ask_for_another_token(model: Model) -> None:
    masked = BatchSequence(model, [1, 2, 3], 10, logits_mask=Choosy({}))
    beside = BatchSequence(model, [4, 5, 6], 10)
    batch = Batch()
    batch.add(masked)
    batch.add(beside)
    assert not run(batch)
    assert drawn(masked) == alone(model, [1, 2, 3], 10, logits_mask=Choosy({})) != alone(model, [1, 2, 3], 10)
    assert drawn(beside) == alone(model, [4, 5, 6], 10)


class Remembering:
    """Keeps one cache, and gives copies of it away."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.states: list[Any] = []
        self.recalled: list[int] = []

    def recall(self, sequence: BatchSequence) -> Any:
        known = self.ids[: len(sequence.ids) - 1]
        self.recalled.append(len(known))
        if not known or sequence.ids[: len(known)] != known:
            return None
        cache = sequence.model.make_cache()
        cache.restore(known, [[array[..., : len(known), :] for array in state] for state in self.states], "short")
        return cache

    def keep(self, sequence: BatchSequence) -> None:
        assert sequence.cache is not None and sequence.cache.offset == len(sequence.ids)
        self.ids, self.states = list(sequence.ids), [layer.state for layer in sequence.cache]


@pytest.mark.parametrize("chunk", [512, 16])
def test_one_prompt_is_read_once_however_often_it_is_answered(model: Model, chunk: int) -> None:
    memory = Remembering()
    batch = Batch(prefill_step_size=chunk, prefixes=memory)
    prompt = list(range(50))
    sequences = [BatchSequence(model, list(prompt), 8) for _ in range(4)]
    for sequence in sequences:
        batch.add(sequence)
    assert not run(batch)
    assert memory.recalled == [0, 49, 49, 49]
    assert all(drawn(sequence) == alone(model, prompt, 8) for sequence in sequences)


def test_the_mistake_of_one_is_not_the_others(model: Model) -> None:
    def broken(logprobs: mx.array) -> mx.array:
        raise ValueError("broken sampler")

    asked = prompts(3, seed=6)
    good, bad, other = (BatchSequence(model, list(prompt), 12) for prompt in asked)
    bad.sampler = broken
    batch = Batch()
    for sequence in (good, bad, other):
        batch.add(sequence)
    (fault,) = run(batch)
    assert fault.sequence is bad and str(fault.error) == "broken sampler"
    assert drawn(good) == alone(model, asked[0], 12) and drawn(other) == alone(model, asked[2], 12)


@pytest.mark.parametrize(("times", "faults"), [(1, 0), (2, 3)])
def test_rows_that_are_lost_begin_anew_once(
    model: Model, monkeypatch: pytest.MonkeyPatch, times: int, faults: int
) -> None:
    asked = prompts(3, seed=7, longest=30)
    sequences = [BatchSequence(model, list(prompt), 12) for prompt in asked]
    batch, failures, settle = Batch(), times, batch_module._Group.settle

    def failing(group: Any) -> list[BatchSequence]:
        nonlocal failures
        members = settle(group)
        if failures and len(members) == 3:
            failures -= 1
            raise RuntimeError("no memory")
        return members

    monkeypatch.setattr(batch_module._Group, "settle", failing)
    for sequence in sequences:
        batch.add(sequence)
    assert len(run(batch)) == faults
    if not faults:
        for sequence, prompt in zip(sequences, asked, strict=True):
            assert drawn(sequence) == alone(model, prompt, 12)


def test_a_sequence_that_ends_leaves_a_cache_of_all_that_is_known(model: Model) -> None:
    asked = prompts(3, seed=8, longest=40)
    sequences = [BatchSequence(model, list(prompt), 50) for prompt in asked]
    batch = Batch()
    for sequence in sequences:
        batch.add(sequence)
    for _ in range(6):
        batch.step()
    for sequence in sequences:
        cache = batch.end(sequence)
        assert cache is not None and cache.ids[0].tolist() == sequence.ids[: cache.offset]
        assert cache.offset == len(sequence.ids) - 1
        whole = model(mx.array([sequence.ids]))[:, -1]
        onward = model(mx.array([sequence.ids[-1:]]), cache)[:, -1]
        np.testing.assert_allclose(np.array(onward), np.array(whole), atol=2e-4)
    assert not batch.active


def test_a_long_row_does_not_fill_up_the_short_ones(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "MAX_PADDING", 16)
    batch = Batch()
    sequences = [BatchSequence(model, [3] * length, 8) for length in (4, 5, 60, 6)]
    for sequence in sequences:
        batch.add(sequence)
    for _ in range(4):
        batch.step()
    assert sorted(len(group.members) for group in batch._groups) == [1, 3]
    run(batch)
    for sequence in sequences:
        assert drawn(sequence)[:8] == alone(model, [3] * sequence.prompt_tokens, 8)


def test_rows_are_masked_where_they_have_not_begun(model: Model) -> None:
    caches = []
    for length in (3, 7, 5):
        cache = model.make_cache()
        model(mx.array([[1] * length]), cache)
        caches.append(cache)
    rows = model.make_batch_cache("short")
    rows.join(caches[:2])
    rows.join(caches[2:])
    assert rows.lengths == [3, 7, 5]
    assert rows.make_mask(1)[:, 0, 0].tolist() == [[n >= 7 - length for n in range(8)] for length in (3, 7, 5)]
    rows.keep([0, 2])
    assert rows.lengths == [3, 5] and rows.columns == 5
    rows.keep([])
    assert rows.lengths == [] and rows.columns == 0


def test_models_share_a_batch_but_no_rows(model: Model) -> None:
    other = make_tiny_model(seed=9)
    one, two = BatchSequence(model, [1, 2, 3], 8), BatchSequence(other, [1, 2, 3], 8)
    batch = Batch()
    batch.add(one)
    batch.add(two)
    run(batch)
    assert drawn(one) == alone(model, [1, 2, 3], 8)
    assert drawn(two) == alone(other, [1, 2, 3], 8)
    assert drawn(one) != drawn(two)


def test_a_token_tells_its_log_probabilities(model: Model) -> None:
    batch = Batch()
    batch.add(BatchSequence(model, [4, 5, 6], 2))
    (token,) = batch.step()
    assert isinstance(token, Token) and token.logprobs is not None
    assert mx.exp(token.logprobs).sum().item() == pytest.approx(1, abs=1e-4)
    assert int(mx.argmax(token.logprobs).item()) == token.token

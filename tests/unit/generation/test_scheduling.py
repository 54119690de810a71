"""The order in which a batch serves sequences, and the prompt tokens that it reads between two tokens of an answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.generation import prefill as prefill_module
from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.prefill import LEAST_CHUNK, ChunkPace
from phi4_mlx.generation.sequence import BatchSequence, Token
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.text import Model
from tests.conftest import make_tiny_model
from tests.model_runs import decoded


@pytest.fixture(scope="module")
def model() -> Model:
    return make_tiny_model(seed=3, original_max_position_embeddings=8192)


class Kept:
    """A prefix store that keeps the caches of sequences that return to the queue."""

    def __init__(self) -> None:
        self.caches: dict[BatchSequence, PromptCache] = {}
        self.recalled: list[int] = []

    def recall(self, sequence: BatchSequence) -> PromptCache | None:
        cache = self.caches.pop(sequence, None)
        self.recalled.append(cache.offset if cache is not None else 0)
        return cache

    def keep(self, sequence: BatchSequence) -> None:
        pass

    def set_aside(self, sequence: BatchSequence) -> None:
        assert sequence.cache is not None
        assert sequence.cache.ids[0].tolist() == sequence.ids[: sequence.cache.offset]
        self.caches[sequence] = sequence.cache


def run(batch: Batch, each_step: Callable[[int], Any] = lambda step: None) -> list[BatchSequence]:
    """Steps until all sequences have ended; returns them in the order of their ends."""
    ended = []
    for step in itertools.count():
        assert step < 2000
        each_step(step)
        for event in batch.step():
            assert isinstance(event, Token), event
            if event.sequence.drawn >= event.sequence.max_tokens and event.sequence in batch.active:
                batch.end(event.sequence)
                ended.append(event.sequence)
        if not (batch.waiting or batch.active):
            return ended
    raise AssertionError


def sequences_of(model: Model, priorities: Sequence[int], max_tokens: int = 4) -> list[BatchSequence]:
    return [BatchSequence(model, [n + 3, 4, 5], max_tokens, priority=each) for n, each in enumerate(priorities)]


def test_the_queue_is_ordered_by_priority_then_by_arrival(model: Model) -> None:
    sequences = sequences_of(model, [0, 2, 0, -1, 1, 0, -1])
    batch = Batch(max_rows=1)
    for sequence in sequences:
        batch.add(sequence)
    assert [sequences.index(each) for each in run(batch)] == [3, 6, 0, 2, 5, 4, 1]
    for sequence in sequences:
        assert sequence.ids[3:] == decoded(model, sequence.ids[:3], 4)


def test_a_running_sequence_makes_room_for_one_of_a_lower_number(model: Model) -> None:
    slow, quick, equal = sequences_of(model, [1, 0, 1], max_tokens=20)
    store = Kept()
    batch, drawn = Batch(max_rows=1, prefixes=store), []
    batch.add(slow)

    def join(step: int) -> None:
        if step == 6:
            drawn.append(slow.drawn)
            batch.add(equal)
            batch.add(quick)

    assert run(batch, join) == [quick, slow, equal]  # it keeps its place before those that came later
    assert store.recalled == [0, 0, slow.prompt_tokens + drawn[0] - 1, 0]  # nothing is computed again
    for sequence in (slow, quick, equal):
        assert sequence.ids[3:] == decoded(model, sequence.ids[:3], 20)


def test_equals_do_not_make_room_for_each_other(model: Model) -> None:
    first, second = sequences_of(model, [1, 1])
    batch = Batch(max_rows=1)
    batch.add(first)
    assert run(batch, lambda step: batch.add(second) if step == 2 else None) == [first, second]


def test_no_sequence_leaves_for_one_that_still_does_not_fit(model: Model) -> None:
    buffer = 256 * model.context_cost().token_bytes
    equal = BatchSequence(model, [5] * 700, 8, priority=0)
    low, large = BatchSequence(model, [3, 4], 8, priority=1), BatchSequence(model, [6] * 1100, 4, priority=0)
    batch = Batch(kv_limit_bytes=8 * buffer, prefixes=Kept())
    batch.add(equal)
    batch.add(low)
    waited: list[bool] = []

    def join(step: int) -> None:
        if step == 3:
            batch.add(large)
        waited.append(low in batch.waiting)

    assert set(run(batch, join)) == {equal, low, large} and not any(waited[1:])
    assert low.ids[2:] == decoded(model, [3, 4], 8)


def test_a_short_row_that_has_no_room_beside_a_long_one_has_columns_of_its_own(model: Model) -> None:
    """Padded to the long row's columns, it would exceed the limit, and alone it does not: it must not go to and fro."""
    buffer = 256 * model.context_cost().token_bytes
    long, short = BatchSequence(model, [5] * 700, 12), BatchSequence(model, [3, 4, 5], 12)
    store = Kept()
    batch = Batch(kv_limit_bytes=5 * buffer, prefill_step_size=1024, prefixes=store)
    batch.add(long)
    batch.add(short)
    run(batch)
    assert store.recalled == [0, 0]
    assert short.ids[3:] == decoded(model, [3, 4, 5], 12)


def test_the_last_in_line_returns_where_memory_is_short(model: Model) -> None:
    buffer = 256 * model.context_cost().token_bytes
    urgent, first, later = sequences = sequences_of(model, [0, 3, 3], max_tokens=300)
    store = Kept()
    batch = Batch(kv_limit_bytes=6 * buffer, prefixes=store)
    batch.add(first)
    batch.add(later)
    batch.step()
    batch.kv_limit_bytes = 3 * buffer  # the two have grown beyond it when their first buffers are full
    left: list[BatchSequence] = []

    def observe(step: int) -> None:
        left.extend(each for each in batch.waiting if each.drawn and each not in left)
        if step == 20:
            batch.add(urgent)

    run(batch, observe)
    assert left[0] is later
    assert all(sequence.ids[3:] == decoded(model, sequence.ids[:3], 300) for sequence in sequences)


def test_a_preempted_prefill_goes_on_where_it_stopped(model: Model) -> None:
    long, urgent = BatchSequence(model, [5] * 60, 3, priority=9), BatchSequence(model, [6, 7], 3)
    store = Kept()
    batch = Batch(max_rows=1, prefill_step_size=16, prefixes=store)
    batch.add(long)
    run(batch, lambda step: batch.add(urgent) if step == 2 else None)
    assert store.recalled == [0, 0, 32]
    assert long.ids[60:] == decoded(model, [5] * 60, 3)


class Machine:
    """A clock that forward passes move on: some time for each pass, and for each token of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pass_s: float = 0.01, token_s: float = 0.001):
        self.now, self.passes = 0.0, list[tuple[int, int]]()  # rows and columns of each pass
        hidden = Model.hidden

        def timed(model: Model, ids: mx.array, *args: Any, **options: Any) -> mx.array:
            self.passes.append((int(ids.shape[0]), int(ids.shape[1])))
            self.now += pass_s + token_s * ids.size
            return hidden(model, ids, *args, **options)

        monkeypatch.setattr(Model, "hidden", timed)

    def __call__(self) -> float:
        return self.now


def prefilled_while_running(model: Model, machine: Machine, batch: Batch, prompts: list[list[int]]) -> list[list[int]]:
    """The chunks of each step while an answer of one row runs."""
    running = BatchSequence(model, [1, 2, 3], 300)
    batch.add(running)
    batch.step()
    batch.step()
    others = [BatchSequence(model, prompt, 1) for prompt in prompts]
    for other in others:
        batch.add(other)
    steps: list[list[int]] = []
    while not all(other.drawn for other in others):
        machine.passes.clear()
        before = running.drawn
        for event in batch.step():
            if event.sequence in others:
                batch.end(event.sequence)
        assert running.drawn == before + 1
        steps.append([columns for rows, columns in machine.passes[1:]])
    return steps


def test_between_two_tokens_of_an_answer_at_most_one_chunk_is_prefilled(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    steps = prefilled_while_running(model, machine, Batch(prefill_step_size=32), [[7] * 100, [8] * 20, [9] * 20])
    assert all(sum(chunks) <= 32 for chunks in steps) and sum(map(sum, steps)) == 140


@pytest.mark.parametrize("limit_ms", [30, 80, 200])
def test_chunks_settle_where_a_step_takes_the_stated_time(
    model: Model, monkeypatch: pytest.MonkeyPatch, limit_ms: int
) -> None:
    """A pass takes 10 ms and 1 ms a token: beside a decode pass of 11 ms, a chunk of n tokens takes 10 + n ms."""
    machine = Machine(monkeypatch)
    batch = Batch(pace=ChunkPace(limit_ms / 1000, machine))
    steps = prefilled_while_running(model, machine, batch, [[7] * 1500])
    fits = max(LEAST_CHUNK, min(512, limit_ms - 21))
    assert all(max(chunks) <= fits for chunks in steps)
    later = [sum(chunks) for chunks in steps[len(steps) // 2 : -2]]
    assert later and all(0.9 * fits <= tokens <= fits for tokens in later), later


def test_many_short_prompts_keep_the_stated_time_together(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    batch = Batch(pace=ChunkPace(0.1, machine))
    steps = prefilled_while_running(model, machine, batch, [[n, 7, 8, 9] for n in range(60)])
    times = [11 + sum(10 + columns for columns in chunks) for chunks in steps]
    assert max(times) <= 100 + 14 and len(steps) < 60


def test_without_running_answers_chunks_are_whole(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    batch = Batch(pace=ChunkPace(0.02, machine))
    batch.add(BatchSequence(model, [7] * 600, 1))
    batch.step()
    assert [columns for _, columns in machine.passes] == [512]


def test_the_first_chunk_of_an_unknown_machine_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    pace = ChunkPace(1e6, lambda: float(next(now)))
    pace.begin()
    assert pace.size(512) == prefill_module.LEAST_CHUNK
    pace.took(16, 512)
    assert pace.size(512) == 512 and pace.size(3) == 3


def test_the_short_end_of_a_prompt_does_not_shrink_the_next_chunk() -> None:
    machine = [0.0]
    pace = ChunkPace(0.1, lambda: machine[0])

    def chunk(tokens: int, seconds: float) -> int:
        pace.begin()
        size = pace.size(512)
        machine[0] += seconds
        pace.took(tokens, 512)
        return size

    chunk(100, 0.1)
    chunk(1, 0.01)  # a pass of one token takes ten times as long a token
    assert chunk(1, 0.05) == 100
    assert chunk(1, 0.01) == 32  # a machine that has become slow is noticed also by short chunks


def test_an_answer_that_crosses_the_boundary_does_not_wait_for_prompts() -> None:
    model = make_tiny_model(seed=3)  # its boundary is at 64 tokens
    crossing, other = BatchSequence(model, [7] * 60, 12), BatchSequence(model, [8] * 900, 1)
    batch, drawn = Batch(prefill_step_size=64), list[int]()
    batch.add(crossing)

    def observe(step: int) -> None:
        if step == 2:
            batch.add(other)
        drawn.append(crossing.drawn)

    assert run(batch, observe)[0] is crossing
    waits = [len([*group]) for count, group in itertools.groupby(drawn) if count < 12]
    assert max(waits) <= 2  # its 65 tokens are read again in two chunks
    assert crossing.ids[60:] == decoded(model, [7] * 60, 12)

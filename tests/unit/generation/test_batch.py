"""Continuous batching: every sequence gets the answer that it would get alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.generation import batch as batch_module
from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.sampling import make_logits_processors, make_sampler
from phi4_mlx.generation.sequence import BatchSequence, Fault, Token
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.snapshot import MAX_SNAPSHOTS
from phi4_mlx.models.text import Model
from tests.conftest import BOUNDARY, make_tiny_model
from tests.kinds import MAKERS
from tests.model_runs import close, decoded, filled_cache
from tests.tiny_sambay import make_tiny_sambay


@pytest.fixture(scope="module")
def model() -> Model:
    return make_tiny_model(seed=3)


@pytest.fixture(scope="module", params=MAKERS)
def each_model(request: pytest.FixtureRequest) -> LanguageModel:
    return MAKERS[request.param](seed=3)


def random_prompts(count: int, seed: int = 0, longest: int = 2 * BOUNDARY) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(510) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def batch_of(*sequences: BatchSequence, **options: Any) -> Batch:
    batch = Batch(**options)
    for sequence in sequences:
        batch.add(sequence)
    return batch


def run(batch: Batch, each_step: Callable[[int], None] = lambda step: None) -> list[Fault]:
    """Steps until all sequences have ended; returns the faults."""
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


def answer(sequence: BatchSequence) -> list[int]:
    return sequence.ids[sequence.prompt_tokens :]


def test_sequences_are_answered_as_alone_also_across_the_boundary(model: Model) -> None:
    asked = [*random_prompts(12), [7] * (BOUNDARY - 1), [8] * BOUNDARY, [9] * (BOUNDARY + 1), [5] * (BOUNDARY - 20)]
    sequences = [BatchSequence(model, list(prompt), 10 + n * 3) for n, prompt in enumerate(asked)]
    assert not run(batch_of(*sequences, max_rows=8, prefill_step_size=48))
    for sequence, prompt in zip(sequences, asked, strict=True):
        assert answer(sequence) == decoded(model, prompt, sequence.max_tokens)
    assert any(len(s.ids) > BOUNDARY >= s.prompt_tokens for s in sequences)  # some cross the boundary


def test_sequences_may_join_and_leave_at_any_step(each_model: LanguageModel) -> None:
    asked = random_prompts(10, seed=1)
    sequences = [BatchSequence(each_model, list(prompt), 25) for prompt in asked]
    batch, cut = batch_of(sequences[0]), sequences[3]

    def join_and_leave(step: int) -> None:
        if 0 < step < len(sequences):
            batch.add(sequences[step])
        if step == 12:
            batch.end(cut)

    run(batch, join_and_leave)
    for sequence, prompt in zip(sequences, asked, strict=True):
        assert answer(sequence) == decoded(each_model, prompt, 25)[: sequence.drawn]
        assert sequence.drawn == 25 or sequence is cut
    assert 0 < cut.drawn < 25


def test_each_sequence_has_its_own_sampler_and_processors(each_model: LanguageModel) -> None:
    asked = random_prompts(4, seed=2)
    sequences = []
    for n, prompt in enumerate(asked):
        sampler = make_sampler(0.9, top_p=0.9, seed=n) if n % 2 else None
        processors = make_logits_processors(repetition_penalty=1.3) if n > 1 else []
        sequences.append(BatchSequence(each_model, list(prompt), 20, sampler, processors))
    run(batch_of(*sequences))
    for n, (sequence, prompt) in enumerate(zip(sequences, asked, strict=True)):
        options: dict[str, Any] = {"sampler": make_sampler(0.9, top_p=0.9, seed=n)} if n % 2 else {}
        if n > 1:
            options["logits_processors"] = make_logits_processors(repetition_penalty=1.3)
        assert answer(sequence) == decoded(each_model, prompt, 20, **options)


def test_a_row_counts_its_state_once_and_a_prefill_its_snapshots_too() -> None:
    model = make_tiny_sambay()
    cost = model.context_cost()
    buffers, states = 256 * cost.token_bytes, cost.fixed_bytes
    row, prefill = buffers + states, buffers + (1 + MAX_SNAPSHOTS) * states
    sequences = [BatchSequence(model, [n + 3, 4, 5], 30) for n in range(4)]
    batch, rows = batch_of(*sequences, kv_limit_bytes=2 * row + 3 * buffers + prefill), []

    def observe(step: int) -> None:
        rows.append(len(batch.active))
        assert batch.nbytes <= batch.kv_limit_bytes

    assert not run(batch, observe)
    assert max(rows) == 3  # two rows, with room to grow, and a prefill
    assert all(answer(each) == decoded(model, each.ids[:3], 30) for each in sequences)


@pytest.mark.slow
def test_the_youngest_sequence_waits_where_caches_would_exceed_the_limit(model: Model) -> None:
    asked = random_prompts(6, seed=4, longest=60)
    limit = 3 * 256 * model.context_cost().token_bytes
    sequences = [BatchSequence(model, list(prompt), 300) for prompt in asked]
    batch = batch_of(*sequences, kv_limit_bytes=limit)
    peak, counts = 0, []

    def observe(step: int) -> None:
        nonlocal peak
        peak = max(peak, batch.nbytes)
        assert all(sequence.cache is None for sequence in batch.waiting)  # a waiting sequence takes no memory
        counts.append((len(batch.active), len(batch.waiting)))

    assert not run(batch, observe)
    # The limit holds before a step, which may add a buffer to each sequence.
    assert peak <= limit + 2 * 256 * model.context_cost().token_bytes
    assert (2, 4) in counts and (1, 5) in counts  # two sequences start; one returns to the queue when both have grown
    for sequence, prompt in zip(sequences, asked, strict=True):
        assert answer(sequence) == decoded(model, prompt, 300)


class ForcingMask:
    """A grammar that allows any token and forces the given tokens after the n-th accepted one."""

    def __init__(self, forced: dict[int, list[int]]):
        self.forced, self.count = forced, 0

    def mask(self) -> mx.array | None:
        return None

    def accept(self, token: int) -> list[int]:
        self.count += 1
        return self.forced.get(self.count, [])


@pytest.mark.parametrize("length", [1, 7, 8, 40])
def test_short_and_long_runs_of_forced_tokens_continue_exactly(each_model: LanguageModel, length: int) -> None:
    prompt, forced = random_prompts(1, seed=5, longest=50)[0], list(range(100, 100 + length))
    masked = BatchSequence(each_model, list(prompt), 90, logits_mask=ForcingMask({4: forced, 9: forced}))
    other = BatchSequence(each_model, [1, 2, 3], 60)
    run(batch_of(masked, other))
    head = decoded(each_model, prompt, 4)
    assert answer(masked)[: 4 + length] == head + forced
    middle = decoded(each_model, [*prompt, *head, *forced], 5)
    assert answer(masked)[4 + length : 9 + 2 * length] == middle + forced
    rest = decoded(each_model, [*prompt, *head, *forced, *middle, *forced], 81 - 2 * length)
    assert answer(masked)[9 + 2 * length :] == rest
    assert answer(other) == decoded(each_model, [1, 2, 3], 60)


def test_a_step_may_run_forced_tokens_only(each_model: LanguageModel) -> None:
    masks = [ForcingMask({3: [100, 101, 102]}) for _ in range(2)]
    sequences = [BatchSequence(each_model, [n, 2, 3], 12, logits_mask=mask) for n, mask in enumerate(masks)]
    assert not run(batch_of(*sequences))
    for n, sequence in enumerate(sequences):
        assert sequence.restarts == 0
        head = decoded(each_model, [n, 2, 3], 3)
        assert answer(sequence) == [*head, 100, 101, 102, *decoded(each_model, [n, 2, 3, *head, 100, 101, 102], 6)]


class RefusingMask(ForcingMask):
    """A grammar that refuses the first token offered at every other step, and then masks it."""

    refused: int | None = None

    def mask(self) -> mx.array | None:
        return None if self.refused is None else mx.arange(512) != self.refused

    def accept(self, token: int) -> Any:
        if self.refused is None and self.count % 2:
            self.refused = token
            return None
        self.refused = None
        return super().accept(token)


def test_a_grammar_may_refuse_a_drawn_token(model: Model) -> None:
    masked = BatchSequence(model, [1, 2, 3], 10, logits_mask=RefusingMask({}))
    other = BatchSequence(model, [4, 5, 6], 10)
    assert not run(batch_of(masked, other))
    assert answer(masked) == decoded(model, [1, 2, 3], 10, logits_mask=RefusingMask({}))
    assert answer(masked) != decoded(model, [1, 2, 3], 10)
    assert answer(other) == decoded(model, [4, 5, 6], 10)


class OnePrefixStore:
    """Stores the newest prompt, and serves sequences with the same prompt."""

    def __init__(self) -> None:
        self.cache: PromptCache | None = None
        self.recalled: list[int] = []  # tokens served, by call

    def recall(self, sequence: BatchSequence) -> PromptCache | None:
        length = len(sequence.ids) - 1
        known = self.cache is not None and self.cache.ids[0].tolist()[:length] == sequence.ids[:length]
        self.recalled.append(length if known else 0)
        return self.cache.fork(length) if self.cache is not None and known else None

    def set_aside(self, sequence: BatchSequence) -> None:
        raise AssertionError("identical prompts share nothing before all of it is prefilled")

    def keep(self, sequence: BatchSequence) -> None:
        assert sequence.cache is not None and sequence.cache.offset == len(sequence.ids)
        self.cache = sequence.cache.fork(sequence.cache.offset)


@pytest.mark.parametrize("chunk", [512, 16])
def test_a_prompt_that_several_sequences_share_is_prefilled_once(model: Model, chunk: int) -> None:
    store, prompt = OnePrefixStore(), list(range(50))
    sequences = [BatchSequence(model, list(prompt), 8) for _ in range(4)]
    assert not run(batch_of(*sequences, prefill_step_size=chunk, prefixes=store))
    assert store.recalled == [0, 49, 49, 49]
    assert all(answer(sequence) == decoded(model, prompt, 8) for sequence in sequences)


def test_an_exception_of_one_sequence_ends_that_sequence_only(each_model: LanguageModel) -> None:
    def broken(logprobs: mx.array) -> mx.array:
        raise ValueError("broken sampler")

    asked = random_prompts(3, seed=6)
    good, bad, other = (BatchSequence(each_model, list(prompt), 12) for prompt in asked)
    bad.sampler = broken
    (fault,) = run(batch_of(good, bad, other))
    assert fault.sequence is bad and str(fault.error) == "broken sampler"
    assert answer(good) == decoded(each_model, asked[0], 12) and answer(other) == decoded(each_model, asked[2], 12)


@pytest.mark.parametrize(("times", "faults"), [(1, 0), (2, 3)])
def test_sequences_whose_step_failed_restart_once(
    model: Model, monkeypatch: pytest.MonkeyPatch, times: int, faults: int
) -> None:
    asked = random_prompts(3, seed=7, longest=30)
    sequences = [BatchSequence(model, list(prompt), 12) for prompt in asked]
    failures, forward = times, Model.hidden

    def failing(model: Model, ids: mx.array, cache: Any = None, **options: Any) -> mx.array:
        nonlocal failures
        if failures and len(ids) == 3:
            failures -= 1
            raise RuntimeError("no memory")
        return forward(model, ids, cache, **options)

    monkeypatch.setattr(Model, "hidden", failing)
    assert len(run(batch_of(*sequences))) == faults
    assert failures == 0
    if not faults:
        for sequence, prompt in zip(sequences, asked, strict=True):
            assert answer(sequence) == decoded(model, prompt, 12)


def test_ending_a_sequence_returns_the_cache_of_its_ids(each_model: LanguageModel) -> None:
    asked = random_prompts(3, seed=8, longest=40)
    sequences = [BatchSequence(each_model, list(prompt), 50) for prompt in asked]
    batch = batch_of(*sequences)
    for _ in range(6):
        batch.step()
    for sequence in sequences:
        cache = batch.end(sequence)
        assert cache is not None and cache.ids[0].tolist() == sequence.ids[: cache.offset]
        assert cache.offset == len(sequence.ids) - 1
        whole = each_model(mx.array([sequence.ids]))[:, -1]
        assert close(each_model(mx.array([sequence.ids[-1:]]), cache)[:, -1], whole, 2e-4)
    assert not batch.active


def test_sequences_of_very_different_length_are_not_padded_to_one_length(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "MAX_PADDING", 16)
    sequences = [BatchSequence(model, [3] * length, 8) for length in (4, 5, 60, 6)]
    batch, forward, passes = batch_of(*sequences), Model.hidden, []

    def recording(model: Model, ids: mx.array, cache: Any = None, **options: Any) -> mx.array:
        passes.append(len(ids))
        return forward(model, ids, cache, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "hidden", recording)
        for _ in range(4):
            passes.clear()
            batch.step()
    assert sorted(passes) == [1, 3]  # sequences in each forward pass of the last step
    run(batch)
    for sequence in sequences:
        assert answer(sequence)[:8] == decoded(model, [3] * sequence.prompt_tokens, 8)


WINDOW = 16  # of the tiny SambaY model
LENGTHS = [1, 2, 7, WINDOW - 1, WINDOW, WINDOW + 1, 31, 32, 33, 2 * WINDOW + 1, 3 * WINDOW, 80, 5, 64, 47, 100]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "chunk"), [(0, 16), (1, 512), (2, 1)])
def test_rows_of_any_length_join_and_leave_in_any_order(seed: int, chunk: int) -> None:
    """16 sequences around the window; some are sampled, some leave early, and one fails."""
    model, draw = make_tiny_sambay(seed=3), random.Random(seed)
    prompts = [[draw.randrange(3, 500) for _ in range(length)] for length in draw.sample(LENGTHS, len(LENGTHS))]

    def sampler(n: int) -> Any:
        return make_sampler(0.9, top_p=0.9, seed=n) if n % 3 == 0 else None

    sequences = [BatchSequence(model, list(each), draw.randint(1, 45), sampler(n)) for n, each in enumerate(prompts)]
    leaving = {draw.randint(1, 60): sequence for sequence in sequences[:4]}
    sequences[4].processors = [lambda ids, logits: logits if len(ids) < 50 else logits[5]]  # out of range
    joining, batch = list(sequences), Batch(max_rows=draw.choice([5, 16]), prefill_step_size=chunk)

    def join_and_leave(step: int) -> None:
        for _ in range(draw.randint(0, 2)):
            if joining:
                batch.add(joining.pop())
        if step in leaving:
            batch.end(leaving[step])

    while joining:
        run(batch, join_and_leave)
        join_and_leave(0)
    run(batch)
    for n, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        expected = decoded(model, prompt, sequence.max_tokens, sampler=sampler(n))
        assert answer(sequence) == expected[: sequence.drawn]
        assert sequence.drawn == sequence.max_tokens or sequence in sequences[:5]


def test_a_sequence_that_is_not_ended_at_its_limit_draws_no_more(model: Model) -> None:
    sequence, other = BatchSequence(model, [3, 4, 5], 2), BatchSequence(model, [6, 7], 6)
    batch = batch_of(sequence, other)
    for _ in range(6):
        batch.step()
    assert (sequence.drawn, other.drawn) == (2, 6)
    assert answer(other) == decoded(model, [6, 7], 6)


def test_a_batch_cache_masks_the_columns_before_each_sequence(model: Model) -> None:
    caches = [filled_cache(model, mx.array([[1] * length])) for length in (3, 7, 5)]
    batch_cache = model.make_batch_cache("short")
    batch_cache.join(caches[:2])
    batch_cache.join(caches[2:])
    assert batch_cache.lengths == [3, 7, 5]
    mask = batch_cache.make_mask(1)
    assert mask is not None
    assert mask[:, 0, 0].tolist() == [[n >= 7 - length for n in range(8)] for length in (3, 7, 5)]
    batch_cache.keep([0, 2])
    assert batch_cache.lengths == [3, 5] and batch_cache.columns == 5
    batch_cache.keep([])
    assert batch_cache.lengths == [] and batch_cache.columns == 0


def test_sequences_of_several_models_share_a_batch(model: Model) -> None:
    other = make_tiny_model(seed=9)
    one, two = BatchSequence(model, [1, 2, 3], 8), BatchSequence(other, [1, 2, 3], 8)
    run(batch_of(one, two))
    assert answer(one) == decoded(model, [1, 2, 3], 8)
    assert answer(two) == decoded(other, [1, 2, 3], 8)
    assert answer(one) != answer(two)


def test_a_drawn_token_carries_its_log_probabilities(model: Model) -> None:
    (token,) = batch_of(BatchSequence(model, [4, 5, 6], 2)).step()
    assert isinstance(token, Token) and token.logprobs is not None
    assert mx.exp(token.logprobs).sum().item() == pytest.approx(1, abs=1e-4)
    assert int(mx.argmax(token.logprobs).item()) == token.token

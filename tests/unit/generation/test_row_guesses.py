"""Guesses in a batch: they change the number of forward passes of the rows, not the tokens of any row."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.guessing import Guessing
from phi4_mlx.generation.row_group import RowGroup, RowPass
from phi4_mlx.generation.sampling import make_logits_processors, make_sampler
from phi4_mlx.generation.sequence import BatchSequence, Fault, Token
from phi4_mlx.generation.speculate import DraftModel, PromptLookup
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.text import Model
from phi4_mlx.tokens.prompt import Prompt
from tests.conftest import BOUNDARY, make_tiny_model
from tests.media import clip, picture, prompt_of
from tests.model_runs import decoded
from tests.tiny_multimodal import make_tiny_multimodal
from tests.tiny_sambay import make_tiny_sambay


@pytest.fixture(scope="module")
def model() -> Model:
    return make_tiny_model(seed=3, hidden_size=192)


class Oracle:
    """A proposer that knows the answer; every `wrong`th of its guesses is false, 0 for none."""

    chance = 0.95

    def __init__(self, prompt: Sequence[int], answer: Sequence[int], wrong: int = 0):
        self.whole, self.wrong, self.known = [*prompt, *answer], wrong, 0

    def begin(self, ids: Sequence[int]) -> None:
        self.known = len(ids)

    def extend(self, tokens: Sequence[int]) -> None:
        self.known += len(tokens)

    def read(self, most: int) -> bool:
        return True

    def nbytes(self, length: int) -> int:
        return 0

    def ahead(self, n: int) -> list[int]:
        guesses = self.whole[self.known : self.known + n]
        places = range(self.known, self.known + n)
        return [
            (each + 1) % 512 if self.wrong and place % self.wrong == 0 else each
            for place, each in zip(places, guesses, strict=False)
        ]


def untimed() -> Guessing:
    return Guessing(timed=False, clock=lambda: 0.0)


def run(sequences: Sequence[BatchSequence], guessing: Guessing | None = None, **options: Any) -> Batch:
    """Answers sequences together, each to its `max_tokens`."""
    batch = Batch(guessing=guessing or untimed(), **options)
    for sequence in sequences:
        batch.add(sequence)
    steps = itertools.count()
    while batch.waiting or batch.active:
        for event in batch.step():
            assert not isinstance(event, Fault), event.error
            if event.sequence.drawn >= event.sequence.max_tokens and event.sequence in batch.active:
                batch.end(event.sequence)
        assert next(steps) < 2000
    return batch


def guessed(model: LanguageModel, prompts: list[list[int]], answers: list[list[int]]) -> list[BatchSequence]:
    """Sequences whose guesses are all true."""
    return [
        BatchSequence(model, [*prompt], len(known), proposer=Oracle(prompt, known))
        for prompt, known in zip(prompts, answers, strict=True)
    ]


def answer(sequence: BatchSequence) -> list[int]:
    return sequence.ids[sequence.prompt_tokens :]


def random_prompt(draw: random.Random, longest: int) -> list[int]:
    return [draw.randrange(510) for _ in range(draw.randint(1, longest))]


@pytest.mark.parametrize("kv_bits", [None, 4, 8])
def test_true_and_false_guesses_give_the_tokens_of_each_row_alone(model: Model, kv_bits: int | None) -> None:
    draw, sequences, expected = random.Random(1), [], []
    for wrong in (0, 1, 2, 3, 7, 0):
        prompt = random_prompt(draw, 60)
        alone = decoded(model, prompt, 40, kv_bits=kv_bits)
        expected.append(alone)
        sequences.append(BatchSequence(model, prompt, 40, kv_bits=kv_bits, proposer=Oracle(prompt, alone, wrong)))
    guessing = untimed()
    run(sequences, guessing)
    assert [answer(sequence) for sequence in sequences] == expected
    assert 0 < guessing.held < guessing.guessed


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_that_copy_take_fewer_passes(model: Model, rows: int) -> None:
    """A bar of the server: at most 0.6 of the passes with four clients."""
    prompts = [[n + 3, 7, n + 9] for n in range(rows)]
    expected = [decoded(model, prompt, 40) for prompt in prompts]
    guessing = untimed()
    run(
        [BatchSequence(model, [*p], 40, proposer=Oracle(p, a)) for p, a in zip(prompts, expected, strict=True)],
        guessing,
    )
    assert guessing.passes <= 0.2 * 39
    assert guessing.held == guessing.guessed == sum(40 - 1 for _ in prompts) - rows * guessing.passes


def test_a_row_without_a_proposer_shares_the_passes_of_the_others(model: Model) -> None:
    prompts = [[1, 2, 3], [9] * 30, [4, 5]]
    expected = [decoded(model, prompt, 50) for prompt in prompts]
    sequences = [
        BatchSequence(model, list(prompt), 50, proposer=Oracle(prompt, alone) if n else None)
        for n, (prompt, alone) in enumerate(zip(prompts, expected, strict=True))
    ]
    run(sequences)
    assert [answer(sequence) for sequence in sequences] == expected


class Masked:
    """A grammar over random ids: bars some tokens, forces runs after others and refuses some that were drawn."""

    def __init__(self, seed: int):
        self.draw, self.barred, self.forced_runs = random.Random(seed), [0], 0

    def mask(self) -> mx.array:
        allowed = [token not in self.barred for token in range(512)]
        return mx.array(allowed)

    def accept(self, token: int) -> list[int] | None:
        assert token not in self.barred
        if token % 5 == 0 and len(self.barred) < 3:
            self.barred.append(token)
            return None
        self.barred = [token, (token * 7) % 512]
        return [(token + n) % 512 for n in range(token % 11)] if token % 3 == 0 else []


def options_of(n: int) -> dict[str, Any]:
    """The options of the n-th sequence, made anew at each call: seeded samplers and grammars have a state."""
    options: dict[str, Any] = {}
    if n % 2:
        options["sampler"] = make_sampler(0.8, top_p=0.95, seed=n)
    if n % 3 == 1:
        options["logits_mask"] = Masked(n)
    if n % 4 == 2:
        options["logits_processors"] = make_logits_processors(frequency_penalty=1.2, repetition_penalty=1.2)
    return options


def sequence_of(n: int, model: LanguageModel, prompt: list[int], max_tokens: int, **more: Any) -> BatchSequence:
    options = options_of(n)
    options["processors"] = options.pop("logits_processors", ())
    return BatchSequence(model, list(prompt), max_tokens, **options, **more)


@pytest.mark.parametrize("wrong", [0, 2, 5])
def test_samplers_grammars_and_penalties_draw_the_same_tokens_under_guesses(model: Model, wrong: int) -> None:
    draw = random.Random(wrong)
    prompts = [random_prompt(draw, 40) for _ in range(12)]
    expected = [decoded(model, prompt, 30, **options_of(n)) for n, prompt in enumerate(prompts)]
    guessing = untimed()
    sequences = [
        sequence_of(n, model, prompt, 30, proposer=Oracle(prompt, alone, wrong))
        for n, (prompt, alone) in enumerate(zip(prompts, expected, strict=True))
    ]
    run(sequences, guessing, max_rows=7)
    assert [answer(sequence) for sequence in sequences] == expected
    assert guessing.held > 40


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_rows_join_and_leave_at_random_with_guesses_of_any_kind(seed: int) -> None:
    """Sequences of two models, three kinds of cache, all options and proposers; some cross the boundary."""
    draw, models = random.Random(seed), [make_tiny_model(seed=3, hidden_size=192), make_tiny_sambay(seed=3)]
    sequences, expected, leaving = [], [], {}
    for n in range(16):
        model = models[n % 5 == 4]
        kv_bits = draw.choice([None, 4, 8]) if model is models[0] else None
        prompt = draw.choice([random_prompt(draw, 30), [3, 4, 5, 6] * 6, [7] * (BOUNDARY - draw.randrange(12))])
        length = draw.randint(1, 40)
        alone = decoded(model, prompt, length, kv_bits=kv_bits, **options_of(n))
        proposers = [Oracle(prompt, alone, draw.choice([0, 1, 3])), PromptLookup(), None]
        if n % 8 == 0:
            proposers = [DraftModel(make_tiny_model(seed=draw.choice([3, 4]), hidden_size=192))]
        proposer = draw.choice(proposers)
        sequences.append(
            sequence_of(n, model, prompt, length, kv_bits=kv_bits, proposer=proposer, priority=draw.randrange(3))
        )
        expected.append(alone)
    for sequence in draw.sample(sequences, 3):
        leaving[draw.randint(1, 40)] = sequence
    costs = [sequence.nbytes for sequence in sequences]
    batch = Batch(draw.choice([4, 16]), 4 * max(costs), draw.choice([16, 512]), guessing=untimed())
    joining, cut, step = list(sequences), set(), 0
    while joining or batch.waiting or batch.active:
        for _ in range(draw.randint(0, 3)):
            if joining:
                batch.add(joining.pop())
        if (left := leaving.pop(step, None)) is not None and left not in joining:
            cache = batch.end(left)
            cut.add(left)
            assert cache is None or cache.ids[0].tolist() == left.ids[: cache.offset]
        for event in batch.step():
            assert isinstance(event, Token), event
            if event.sequence.drawn >= event.sequence.max_tokens and event.sequence in batch.active:
                cache = batch.end(event.sequence)
                assert cache is None or cache.ids[0].tolist() == event.sequence.ids[: cache.offset]
        step += 1
        assert step < 2000
    for sequence, alone in zip(sequences, expected, strict=True):
        assert answer(sequence) == alone[: sequence.drawn]
        assert sequence.drawn == sequence.max_tokens or sequence in cut
    assert batch.guessing.failures == 0


def test_recurrent_rows_are_not_guessed() -> None:
    model, guessing = make_tiny_sambay(seed=3), untimed()
    assert not model.make_batch_cache("short").rewindable
    prompts = [[3, 4, 5] * 8, [6, 7] * 9]
    sequences = [BatchSequence(model, list(prompt), 20, proposer=PromptLookup()) for prompt in prompts]
    run(sequences, guessing)
    assert [answer(each) for each in sequences] == [decoded(model, prompt, 20) for prompt in prompts]
    assert guessing.guessed == 0 and guessing.passes == 19


@pytest.mark.parametrize("below", [0, 1, 2, 5, 9])
def test_no_guess_crosses_the_rope_boundary(model: Model, below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[7] * (BOUNDARY - below), [8, 9] * 4]
    expected = [decoded(model, prompt, 30) for prompt in prompts]
    sequences = guessed(model, prompts, expected)
    run_chunks, ends = RowGroup.run, list[int]()

    def recording(self: RowGroup, chunks: list[list[int]]) -> RowPass:
        if self.cache.regime == "short":
            ends.extend(length + len(chunk) for length, chunk in zip(self.cache.lengths, chunks, strict=True))
        return run_chunks(self, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(RowGroup, "run", recording)
        run(sequences)
    assert [answer(sequence) for sequence in sequences] == expected
    assert max(ends, default=0) <= BOUNDARY


def test_guesses_end_before_the_end_of_an_answer_and_before_a_picture() -> None:
    model = make_tiny_multimodal(seed=3)
    slot = min(model.slot_ids)
    sequence = BatchSequence(model, [1, 2], 20, proposer=Oracle([1, 2], [5, 6, 9, 7, slot, 8]), end_ids=frozenset({9}))
    sequence.inform()
    assert sequence.guesses(6) == [5, 6]
    sequence.ids += [5, 6, 9]
    sequence.inform()
    assert sequence.guesses(6) == [7]


def test_rows_with_pictures_are_guessed_as_others() -> None:
    model = make_tiny_multimodal(seed=3)
    prompts = [prompt_of([5, 6], picture(1), [7, 8, 9]), prompt_of([5, 6, 7]), prompt_of([4], picture(2), [5], clip(1))]
    expected = [decoded(model, prompt, 20) for prompt in prompts]
    guessing = untimed()
    sequences = [
        BatchSequence(model, Prompt([*prompt], prompt.places), 20, proposer=Oracle(prompt, alone, 5))
        for prompt, alone in zip(prompts, expected, strict=True)
    ]
    run(sequences, guessing)
    assert [answer(sequence) for sequence in sequences] == expected
    assert guessing.held > 20


def test_a_drawn_guess_carries_its_log_probabilities(model: Model) -> None:
    prompt = [4, 5, 6]
    alone = decoded(model, prompt, 12)

    def logprobs(proposer: Any) -> list[list[float]]:
        batch, found = Batch(guessing=untimed()), []
        sequence = BatchSequence(model, list(prompt), 12, proposer=proposer)
        batch.add(sequence)
        while sequence.drawn < 12:
            for token in batch.step():
                assert isinstance(token, Token) and token.logprobs is not None
                found.append(token.logprobs.tolist())
        return found

    assert mx.allclose(mx.array(logprobs(Oracle(prompt, alone))), mx.array(logprobs(None)), atol=1e-4)


class Clock:
    """Seconds that passes take: a fixed time, and some for each further column."""

    def __init__(self, further: float):
        self.now, self.further = 0.0, further

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("further", "pays"), [(0.02, True), (3.0, False)])
def test_measured_times_decide_whether_a_batch_guesses(
    model: Model, monkeypatch: pytest.MonkeyPatch, further: float, pays: bool
) -> None:
    clock, hidden = Clock(further), Model.hidden

    def slow(self: Model, ids: mx.array, *args: Any, **options: Any) -> mx.array:
        clock.now += 0.01 * (1 + clock.further * (ids.shape[1] - 1))
        return hidden(self, ids, *args, **options)

    monkeypatch.setattr(Model, "hidden", slow)
    prompts = [[n + 3, 7, n + 9] for n in range(3)]
    expected = [decoded(model, prompt, 60) for prompt in prompts]
    guessing = Guessing(timed=True, clock=clock)
    run(
        [BatchSequence(model, [*p], 60, proposer=Oracle(p, a)) for p, a in zip(prompts, expected, strict=True)],
        guessing,
    )
    assert (guessing.passes < 12) is pays and guessing.held == guessing.guessed
    assert pays or guessing.passes > 40


def test_a_proposer_that_raises_does_not_end_an_answer(model: Model) -> None:
    class Broken(Oracle):
        def ahead(self, n: int) -> list[int]:
            raise ValueError("broken")

    prompts = [[1, 2, 3], [4, 5, 6]]
    expected = [decoded(model, prompt, 20) for prompt in prompts]
    guessing = untimed()
    sequences = guessed(model, prompts, expected)
    sequences[0].proposer = Broken(prompts[0], expected[0])
    run(sequences, guessing)
    assert [answer(sequence) for sequence in sequences] == expected
    assert guessing.failures == 1 and guessing.held > 0


def test_a_draft_model_reads_a_long_prompt_in_chunks_beside_the_answers(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4_mlx.generation.guessing.READ_AHEAD", 8)
    monkeypatch.setattr("phi4_mlx.generation.speculate.READ_AT_ONCE", 8)
    drafts = [make_tiny_model(seed=3, hidden_size=192) for _ in range(2)]
    prompts = [[n + 5, 6, 7, 8] * 9 for n in range(2)]
    expected = [decoded(model, prompt, 40) for prompt in prompts]
    lengths, guessing, hidden = [], untimed(), Model.hidden

    def recording(self: Model, ids: mx.array, *args: Any, **options: Any) -> mx.array:
        if any(self is draft for draft in drafts):
            lengths.append(ids.shape[1])
        return hidden(self, ids, *args, **options)

    monkeypatch.setattr(Model, "hidden", recording)
    sequences = [
        BatchSequence(model, [*prompt], 40, proposer=DraftModel(draft))
        for prompt, draft in zip(prompts, drafts, strict=True)
    ]
    assert sequences[0].nbytes > BatchSequence(model, [*prompts[0]], 40).nbytes
    run(sequences, guessing)
    assert [answer(sequence) for sequence in sequences] == expected
    assert max(lengths) <= 8 and guessing.held > 20

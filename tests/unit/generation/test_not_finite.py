"""A model whose weights are NaN or overflow: one clear error in place of an answer of `!!!!`; other answers go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.commands.generate import main
from phi4_mlx.errors import CheckpointError
from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.sampling import make_logits_processors, make_sampler
from phi4_mlx.generation.sequence import BatchSequence, Fault
from phi4_mlx.generation.speculate import PromptLookup
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.text import Model
from phi4_mlx.server.engine.engine import Engine
from phi4_mlx.server.engine.protocol import Failure, Job
from phi4_mlx.server.engine.settings import Settings
from tests.conftest import Demo, TinyCheckpoint, make_tiny_model
from tests.unit.convert.test_finite import poisoned
from tests.unit.server.engine.harness import run

EVERYTHING = "computed NaN or infinity instead of logits"
SAMPLERS: list[dict[str, Any]] = [
    {}, {"temp": 1.0}, {"temp": 0.7, "top_p": 0.9}, {"temp": 1.0, "top_p": 0.1}, {"temp": 1.0, "top_k": 5},
    {"temp": 1.0, "min_p": 0.1},
]  # fmt: skip


def with_value(value: float, room: Callable[[Model], Any], row: int = 0) -> Model:
    """A model with one number in a row of a matrix."""
    model = make_tiny_model(seed=3)
    weight = room(model).weight
    weight[row] = value
    room(model).weight = weight
    return model


class Anything:
    """A grammar that allows every token."""

    def mask(self) -> mx.array:
        return mx.ones(512, mx.bool_)

    def accept(self, token: int) -> list[int]:
        return []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("options", [{}, {"proposer": PromptLookup}, {"logits_mask": Anything}])
def test_no_token_is_drawn_from_nan(value: float, sampler: dict[str, Any], options: dict[str, Any]) -> None:
    model = with_value(value, lambda model: model.layers[1].mlp.down_proj)
    made = {name: make() for name, make in options.items()}
    with pytest.raises(CheckpointError, match=EVERYTHING) as caught:
        list(generate_step([5, 6, 7], model, max_tokens=4, sampler=make_sampler(**sampler), **made))
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=EVERYTHING):
        next(iter(generate_step([5, 6, 7], model, max_tokens=1, **made)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_damaged_row_of_the_head_is_enough(sampler: dict[str, Any]) -> None:
    """The other logits are numbers, and a token among them could be drawn."""
    model = with_value(math.nan, lambda model: model.model.embed_tokens, row=400)
    with pytest.raises(CheckpointError, match=EVERYTHING):
        list(generate_step([5, 6, 7], model, max_tokens=2, sampler=make_sampler(**sampler)))


def test_an_answer_ends_where_the_numbers_do() -> None:
    model = make_tiny_model(seed=3)
    healthy = [token for token, _ in generate_step([5, 6, 7], model, max_tokens=8)]

    def overflow_later(ids: mx.array, logits: mx.array) -> mx.array:
        return logits * (mx.inf if ids.shape[0] > 6 else 1)

    drawn = []
    with pytest.raises(CheckpointError, match=EVERYTHING):
        for token, _ in generate_step([5, 6, 7], model, max_tokens=8, logits_processors=[overflow_later]):
            drawn.append(token)
    assert drawn == healthy[:4]


def test_logits_that_are_biased_away_are_no_damage() -> None:
    processors = make_logits_processors({5: -100.0})
    assert list(generate_step([5, 6, 7], make_tiny_model(), max_tokens=3, logits_processors=processors))

    def only_nine(ids: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(512) == 9, logits, -mx.inf)

    for sampler in (None, make_sampler(1.0)):
        found = generate_step([5], make_tiny_model(), max_tokens=3, sampler=sampler, logits_processors=[only_nine])
        assert [token for token, _ in found] == [9, 9, 9]


def test_only_the_sequences_of_a_damaged_model_fail() -> None:
    damaged, healthy = with_value(math.nan, lambda model: model.layers[0].mlp.down_proj), make_tiny_model(seed=3)
    sequences = [BatchSequence(model, [5, 6, 7], 5) for model in (healthy, damaged, healthy)]
    sequences.append(BatchSequence(damaged, [8, 9], 5, sampler=make_sampler(1.0)))
    batch, faults = Batch(), []
    for sequence in sequences:
        batch.add(sequence)
    while batch.active or batch.waiting:
        for event in batch.step():
            if isinstance(event, Fault):
                faults.append(event)
            elif event.sequence.drawn == 5:
                batch.end(event.sequence)
    assert {fault.sequence for fault in faults} == {sequences[1], sequences[3]}
    assert all(isinstance(fault.error, CheckpointError) for fault in faults)
    alone = [token for token, _ in generate_step([5, 6, 7], healthy, max_tokens=5)]
    assert [sequence.ids[3:] for sequence in (sequences[0], sequences[2])] == [alone, alone]


def test_the_server_answers_500_and_its_engine_lives(demo: Demo) -> None:
    model, tokenizer = demo
    engine = Engine(model, tokenizer, Settings("demo"))
    jobs = [Job(n, (5, 6, 7), 4) for n in range(3)]
    weight = model.model.norm.weight
    try:
        model.model.norm.weight = weight * math.nan
        for events in run(engine, *jobs).values():
            (failure,) = events
            assert isinstance(failure, Failure) and failure.status == 500 and EVERYTHING in failure.message
    finally:
        model.model.norm.weight = weight
    assert not any(isinstance(event, Failure) for events in run(engine, *jobs).values() for event in events)


def test_the_command_prints_one_line_and_exits_non_zero(
    tiny_checkpoint: TinyCheckpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    source = poisoned(tiny_checkpoint(), math.nan, "model.layers.0.mlp.down_proj.weight")
    assert main(["--model", str(source), "--prompt", "hi", "--max-tokens", "5"]) == 2
    printed = capfd.readouterr()
    assert printed.out.strip() == "" and printed.err.count("\n") == 1 and EVERYTHING in printed.err

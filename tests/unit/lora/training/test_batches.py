"""Batches: few empty slots, an order that follows from seed and position, and separate samples within a row."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.data.samples import Pair, Sample
from phi4_mlx.errors import RequestError
from phi4_mlx.lora.training.batches import Batch, Batches
from phi4_mlx.models.text import Model

BOUNDARY = 64  # of the tiny models


def samples_of(lengths: list[int], seed: int = 0) -> list[Sample]:
    draw = random.Random(seed)
    return [
        Sample(draw.choices(range(1, 512), k=length), [False, *draw.choices([False, True], k=length - 1)], f"x:{n}")
        for n, length in enumerate(lengths, 1)
    ]


def skewed_lengths(count: int, longest: int) -> list[int]:
    """Lengths as in chats: most of them short, a few at the limit."""
    draw = random.Random(7)
    return [min(longest, max(2, round(draw.lognormvariate(5, 1)))) for _ in range(count)]


def content(batch: Batch) -> list[Any]:
    return [array.tolist() for array in (batch.inputs, batch.targets, batch.mask, batch.segments)]


def test_a_row_is_laid_out_to_the_token() -> None:
    samples = [
        Sample([5, 6, 7], [False, True, False], "x:1"),
        Sample([8, 9, 10, 11], [False, False, True, True], "x:2"),
        Sample([12, 13], [False, True], "x:3"),
    ]
    (batch,) = Batches(samples, max_seq_length=8).fixed()
    assert batch.inputs.tolist() == [[8, 9, 10, 5, 6, 12]]
    assert batch.targets.tolist() == [[9, 10, 11, 6, 7, 13]]
    assert batch.mask.tolist() == [[False, True, True, True, False, True]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 3]]
    assert [a.dtype for a in (batch.inputs, batch.targets, batch.segments)] == [mx.int32] * 3
    assert batch.mask.dtype == mx.bool_


def test_pairs_stand_side_by_side() -> None:
    chosen, rejected = Sample([5, 6, 7], [False, False, True], "x:1"), Sample([5, 8], [False, True], "x:1")
    longer = Pair(Sample([9, 9], [False, True], "x:2"), Sample([9, 8, 7, 6], [False] * 3 + [True], "x:2"))
    (batch,) = Batches([Pair(chosen, rejected), longer], max_seq_length=4).fixed()
    assert batch.segments.tolist() == [[1, 2, 2, 2, 3, 3, 4]]
    assert batch.targets.tolist() == [[9, 8, 7, 6, 6, 7, 8]]


LENGTHS = {
    "short": [8 + 7 * n % 33 for n in range(200)],
    "long": [1200 + 37 * n % 849 for n in range(40)],
    "cut at the limit": [2048] * 50,
    "mixed": [20 if n % 3 else 1900 for n in range(90)],
    "as in chats": skewed_lengths(400, 2048),
    "every length": list(range(2, 2049, 7)),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("batch_size", [1, 4, 8, 32])
def test_a_batch_has_the_samples_that_mlx_lms_has_and_hardly_a_slot_is_empty(
    lengths: list[int], batch_size: int
) -> None:
    """An epoch is as many batches, each with --batch-size samples, and every sample comes once."""
    rest = [[1] * (length - 1) for length in lengths]
    samples = [Sample([n, *ids], [False] + [True] * len(ids), "x:1") for n, ids in enumerate(rest)]
    batches = Batches(samples, batch_size=batch_size)
    counts, slots, seen = [], 0, []
    for _ in range(batches.steps_per_epoch):
        batch = next(batches)
        segments = np.array(batch.segments)[0]
        firsts = np.flatnonzero(np.diff(segments, prepend=0) > 0)
        counts.append(len(firsts))
        seen += np.array(batch.inputs)[0, firsts].tolist()
        slots += batch.inputs.size
    assert sorted(seen) == list(range(len(lengths)))
    assert sum(counts) / len(counts) == pytest.approx(batch_size, rel=0.1) or len(lengths) < 3 * batch_size
    assert slots <= 1.05 * sum(n - 1 for n in lengths)


@pytest.mark.parametrize(
    ("count", "batches"), [(1, [1]), (3, [3]), (4, [4]), (5, [2, 3]), (9, [3, 3, 3]), (11, [3, 4, 4])]
)
def test_few_samples_are_shared_evenly(count: int, batches: list[int]) -> None:
    made = Batches(samples_of([9] * count))
    assert sorted(int(batch.segments.max().item()) for batch in made.fixed()) == batches


def test_without_packing_rows_are_of_similar_length() -> None:
    lengths = skewed_lengths(4000, 2048)
    made = Batches([Sample([1] * n, [False] + [True] * (n - 1), "x:1") for n in lengths], packing=False)
    assert sum(batch.inputs.size for batch in made.fixed()) <= 1.02 * sum(n - 1 for n in lengths)


@pytest.mark.parametrize("packing", [True, False])
def test_the_model_keeps_a_rows_samples_apart(tiny_model: Callable[..., Model], packing: bool) -> None:
    """Samples on both sides of the LongRoPE boundary share rows, in one stretch or several."""
    model, samples = tiny_model(), samples_of([3, 5, 9, 20, 30, BOUNDARY + 1, BOUNDARY + 2, 80, 300, 280])
    batches = Batches(samples, max_seq_length=300, packing=packing, batch_size=10)
    assert len(*batches.shapes()) == (3 if packing else 10)
    alone = {tuple(s.ids[:-1]): model.hidden(mx.array([s.ids[:-1]]))[0] for s in samples}
    seen, mixed = 0, False
    for batch in batches.fixed():
        hidden, segments = model.hidden(batch.inputs, segments=batch.segments), np.array(batch.segments)
        for row in range(len(segments)):
            places = [np.flatnonzero(segments[row] == number) for number in range(1, segments[row].max() + 1)]
            mixed |= {len(at) > BOUNDARY for at in places} == {True, False}
            for at in places:
                expected = alone[tuple(np.array(batch.inputs)[row, at].tolist())]
                assert mx.allclose(hidden[row, int(at[0]) : int(at[-1]) + 1], expected, rtol=0, atol=1e-4)
                seen += 1
    assert seen == len(samples) and mixed == packing


def test_the_order_is_the_seeds_and_each_epoch_has_its_own() -> None:
    samples = samples_of(skewed_lengths(60, 100))

    def epoch(seed: int, number: int) -> list[Any]:
        batches = Batches(samples, max_seq_length=128, batch_size=2, seed=seed)
        steps = batches.steps_per_epoch
        return [content(batch) for batch in islice(batches, number * steps, (number + 1) * steps)]

    assert epoch(0, 0) == epoch(0, 0) and epoch(3, 2) == epoch(3, 2)
    assert epoch(0, 0) != epoch(0, 1) and epoch(0, 0) != epoch(1, 0)
    widths = [len(inputs[0]) for inputs, *_ in epoch(0, 0)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


def test_the_order_is_the_same_everywhere() -> None:
    """Written out, so that a checkpoint can resume under another Python and on another machine."""
    samples = [Sample([n] * 4, [False, True, True, True], f"x:{n}") for n in range(10)]
    batches = Batches(samples, batch_size=4, seed=5)
    assert [next(batches).inputs[0, ::3].tolist() for _ in range(6)] == [
        [4, 0, 1], [6, 2, 9], [7, 5, 3, 8], [4, 0, 9, 7], [3, 1, 2], [5, 8, 6]
    ]  # fmt: skip


def test_positions_go_through_json_in_mid_epoch() -> None:
    samples = samples_of(skewed_lengths(60, 100))
    batches = Batches(samples, max_seq_length=128, batch_size=2)
    for _ in range(batches.steps_per_epoch + 3):
        next(batches)
    state = json.loads(json.dumps(batches.state_dict()))
    assert (state["epoch"], state["step"]) == (batches.epoch, batches.step) == (1, 3)
    expected = [content(next(batches)) for _ in range(2 * batches.steps_per_epoch)]
    resumed = Batches(samples, max_seq_length=128, batch_size=2)
    resumed.load_state_dict(state)
    assert [content(next(resumed)) for _ in expected] == expected


def test_the_fixed_batches_are_the_same_at_every_call() -> None:
    batches = Batches(samples_of(skewed_lengths(60, 100)), max_seq_length=128, batch_size=2)
    first = [content(batch) for batch in batches.fixed(3)]
    for _ in range(batches.steps_per_epoch + 1):
        next(batches)
    before = batches.state_dict()
    assert [content(batch) for batch in batches.fixed(3)] == first and len(first) == 3
    assert [content(batch) for batch in batches.fixed()][:3] == first
    assert len(list(batches.fixed())) == batches.steps_per_epoch
    assert batches.state_dict() == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 1}, "seed is 0 there, and 1 here"),
        ({"batch_size": 2}, "batch_size is 4 there, and 2 here"),
        ({"samples": samples_of([10, 20])}, "samples is 3 there, and 2 here"),
        ({"samples": samples_of([10, 20, 31])}, "data_hash is '"),
        ({"samples": samples_of([10, 20, 30], seed=1)}, "data_hash is '"),
        ({"samples": [Sample(s.ids, [False] * len(s.ids), s.source) for s in samples_of([10, 20, 30])]}, "data_hash"),
    ],
)
def test_a_position_of_another_run_is_refused(changes: dict[str, Any], reason: str) -> None:
    options: dict[str, Any] = {"samples": samples_of([10, 20, 30]), "max_seq_length": 100}
    state = Batches(**options).state_dict()
    with pytest.raises(RequestError, match="the checkpoint is of another run: " + reason):
        Batches(**options | changes).load_state_dict(state)
    Batches(**options | {"rank": 1, "world": 2}).load_state_dict(state)


@pytest.mark.parametrize("position", [{"epoch": -1}, {"step": 1}, {"step": "0"}, {"epoch": None}, {"step": True}])
def test_a_damaged_position_is_refused(position: dict[str, Any]) -> None:
    batches = Batches(samples_of([10, 20, 30]))
    with pytest.raises(RequestError, match="the checkpoint is damaged"):
        batches.load_state_dict(batches.state_dict() | position)
    assert (batches.epoch, batches.step) == (0, 0)


def test_what_cannot_be_batched_is_refused() -> None:
    with pytest.raises(RequestError, match="no samples"):
        Batches([])
    with pytest.raises(RequestError, match=r"x:2 takes 101 slots, of a sample's 100"):
        Batches(samples_of([10, 102]), max_seq_length=100)
    with pytest.raises(RequestError, match="--batch-size 3 must be a multiple of the 2 processes"):
        Batches(samples_of([10]), batch_size=3, world=2)
    with pytest.raises(RequestError, match="--batch-size 0"):
        Batches(samples_of([10]), batch_size=0)


def test_a_rank_without_rows_has_one_without_targets() -> None:
    batch = next(Batches(samples_of([10]), rank=1, world=2, batch_size=2))
    assert batch.inputs.shape[0] == 1 and not batch.mask.any() and not batch.segments.any()

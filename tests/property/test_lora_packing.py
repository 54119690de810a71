"""Batches of any samples hold exactly their tokens, none lost or repeated, in as few slots as they need."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4_mlx.data.samples import Pair, Sample
from phi4_mlx.lora.training.batches import Batch, Batches, rounded

LENGTH = 40


@st.composite
def a_sample(draw: st.DrawFn) -> Sample:
    # Few different tokens, including 0, so that samples resemble each other and empty slots.
    ids = draw(st.lists(st.integers(0, 3), min_size=2, max_size=LENGTH))
    targets = draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))
    return Sample(ids, [False, *targets], "train.jsonl:1")


pairs = st.builds(Pair, a_sample(), a_sample())
data = st.one_of(st.lists(a_sample(), min_size=1, max_size=30), st.lists(pairs, min_size=1, max_size=10))
options = st.fixed_dictionaries({"packing": st.booleans(), "seed": st.integers(0, 9), "batch_size": st.just(4)})


def as_segment(sample: Sample) -> tuple[Any, ...]:
    """The segment that a sample should become: inputs, targets and mask."""
    return tuple(sample.ids[:-1]), tuple(sample.ids[1:]), tuple(sample.targets[1:])


def rows_of(batch: Batch) -> list[list[tuple[Any, ...]]]:
    """The segments of each row, read from the arrays; all slots outside them must be empty."""
    rows = []
    arrays = (np.array(batch.inputs), np.array(batch.targets), np.array(batch.mask), np.array(batch.segments))
    assert len({array.shape for array in arrays}) == 1
    for inputs, targets, mask, segments in zip(*arrays, strict=True):
        used = int((segments > 0).sum())
        assert np.all(np.diff(segments[:used]) >= 0) and not segments[used:].any(), "in order, then empty slots"
        assert not inputs[used:].any() and not targets[used:].any() and not mask[used:].any()
        assert list(np.unique(segments[:used])) == list(range(1, segments.max() + 1)), "numbered from 1, without gaps"
        parts = [segments == number for number in range(1, segments.max() + 1)]
        rows.append([tuple(tuple(array[part].tolist()) for array in (inputs, targets, mask)) for part in parts])
    return rows


def segments_of(rows: list[list[tuple[Any, ...]]]) -> Counter[tuple[Any, ...]]:
    return Counter(segment for row in rows for segment in row)


@settings(max_examples=150)
@given(data, options)
def test_an_epoch_holds_exactly_the_samples(samples: list[Any], options: dict[str, Any]) -> None:
    batches = Batches(samples, max_seq_length=LENGTH, **options)
    for _ in range(2):  # the second epoch has another order and holds the same samples
        rows = [row for _ in range(batches.steps_per_epoch) for row in rows_of(next(batches))]
        if isinstance(samples[0], Pair):
            assert all(len(row) % 2 == 0 for row in rows)
            found = Counter(pair for row in rows for pair in zip(row[::2], row[1::2], strict=True))
            assert found == Counter((as_segment(pair.chosen), as_segment(pair.rejected)) for pair in samples)
        else:
            assert segments_of(rows) == Counter(map(as_segment, samples))
        assert len(rows) == (batches.steps_per_epoch if options["packing"] else len(samples))


@settings(max_examples=50)
@given(data, options, st.sampled_from([2, 4]))
def test_the_ranks_split_each_batch(samples: list[Any], options: dict[str, Any], world: int) -> None:
    whole = Batches(samples, max_seq_length=LENGTH, **options)
    parts = [Batches(samples, max_seq_length=LENGTH, rank=rank, world=world, **options) for rank in range(world)]
    assert {part.steps_per_epoch for part in parts} == {whole.steps_per_epoch}
    for _ in range(whole.steps_per_epoch + 1):
        together = [row for part in parts for row in rows_of(next(part))]
        assert segments_of(together) == segments_of(rows_of(next(whole)))
        assert all(part.state_dict() == whole.state_dict() for part in parts)


@settings(max_examples=100)
@given(data, options, st.integers(0, 12), st.integers(0, 9))
def test_a_restored_position_continues_with_the_same_batches(
    samples: list[Any], options: dict[str, Any], before: int, elsewhere: int
) -> None:
    unbroken, resumed = (Batches(samples, max_seq_length=LENGTH, **options) for _ in range(2))
    for _ in range(before):
        next(unbroken)
    for _ in range(elsewhere):  # the position before the restore has no effect
        next(resumed)
    resumed.load_state_dict(unbroken.state_dict())
    for _ in range(2 * unbroken.steps_per_epoch):
        assert rows_of(next(resumed)) == rows_of(next(unbroken))


@settings(max_examples=100)
@given(data, options, st.integers(1, 9))
def test_batches_hold_as_many_samples_as_they_are_asked_to(
    samples: list[Any], options: dict[str, Any], batch_size: int
) -> None:
    """Without packing too, and the same samples."""
    packed, plain = (
        Batches(samples, max_seq_length=LENGTH, **options | {"packing": packing, "batch_size": batch_size})
        for packing in (True, False)
    )
    parts = 2 if isinstance(samples[0], Pair) else 1
    counts = []
    for _ in range(2 * packed.steps_per_epoch):
        (row,), rows = rows_of(next(packed)), rows_of(next(plain))
        assert row == [segment for row in rows for segment in row]
        counts.append(len(row) // parts)
    assert packed.steps_per_epoch == -(-len(samples) // batch_size)
    assert max(counts) <= batch_size and max(counts) - min(counts) <= 1


@given(st.integers(0, 10**6))
def test_widths_are_few_and_waste_little(slots: int) -> None:
    assert max(1, slots) <= rounded(slots) <= max(1, slots * 33 / 32)
    assert len({rounded(each) for each in range(slots, 2 * slots, max(1, slots // 1000))}) <= 34 or slots < 64


@settings(max_examples=50)
@given(data, options)
def test_rows_are_no_wider_than_the_longest_one_needs(samples: list[Any], options: dict[str, Any]) -> None:
    batches = Batches(samples, max_seq_length=LENGTH, **options)
    for batch in batches.fixed():
        used = int((np.array(batch.segments) > 0).sum(axis=1).max())
        assert batch.inputs.shape[1] == rounded(used)
    slots = {sum(shape) for shape in batches.shapes()}
    assert slots == {batch.inputs.size for batch in batches.fixed()}
    first, second = ({next(batches).inputs.size for _ in range(batches.steps_per_epoch)} for _ in range(2))
    assert first == second == slots

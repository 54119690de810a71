"""Samples -> batches, packed into rows or sorted by length, in an order that follows from a seed and a position.

A row holds several samples side by side, numbered by `segments`; the model gives each sample its own positions, its own
RoPE table, and an attention mask that hides the others. So samples of any length may share a row, and few slots are
left empty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np

from phi4_mlx.errors import RequestError
from phi4_mlx.lora.data.samples import Pair, Sample

WIDTH_STEP = 32  # row widths are multiples of this: with few shapes, freed buffers are reused

Row = list[int]
"""The samples (or pairs) of a row by index, from left to right."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of samples. In a pair, the chosen answer has an odd segment, and the rejected one the next even number.

    Attributes:
        inputs: token ids, int32 [B, T]; 0 where the row is empty.
        targets: the token after each input, int32 [B, T].
        mask: True for targets that count, bool [B, T].
        segments: the sample's number in its row, from 1; 0 where the row is empty; int32 [B, T].
    """

    inputs: mx.array
    targets: mx.array
    mask: mx.array
    segments: mx.array


class Batches:
    """An endless iterator of batches; each epoch yields every sample once, in its own order.

    Args:
        samples: samples, or pairs; a pair stays together in a row.
        batch_size: rows in a batch, over all ranks.
        max_seq_length: slots of a row, in tokens; rows of pairs have twice as many.
        packing: True for several samples per row; else one, and rows of similar length in a batch.
        seed: seed of the order.
        rank: number of this process, from 0; selects its rows of each batch.
        world: number of processes that train together.

    Attributes:
        epoch: number of completed epochs.
        step: number of batches of the current epoch that have been yielded.
        steps_per_epoch: batches in an epoch; the last one may have fewer rows.
        rows: most rows of a batch in this process.
        world: number of processes that train together.

    Raises:
        RequestError: there are no samples, one is too long for a row, or the ranks cannot share the batch size.
    """

    def __init__(
        self,
        samples: Sequence[Sample] | Sequence[Pair],
        *,
        batch_size: int = 4,
        max_seq_length: int = 2048,
        packing: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if not samples:
            raise RequestError("there are no samples to make batches of")
        if batch_size < 1 or batch_size % world:
            raise RequestError(f"--batch-size {batch_size} must be a multiple of the {world} processes that share it")
        self._parts = [(each.chosen, each.rejected) if isinstance(each, Pair) else (each,) for each in samples]
        self._slots = [sum(len(sample.ids) - 1 for sample in parts) for parts in self._parts]
        self._capacity = max_seq_length * len(self._parts[0])
        for parts, slots in zip(self._parts, self._slots, strict=True):
            if not 0 < slots <= self._capacity:
                raise RequestError(f"{parts[0].source} takes {slots:,} slots, of a row's {self._capacity:,}")
        self._batch_size, self._packing, self._seed = batch_size, packing, seed
        self._rank, self.world = rank, world
        self.rows = batch_size // world
        self.epoch = self.step = 0
        self._planned, self._plan = 0, self._batches_of(0)
        self.steps_per_epoch = len(self._plan)  # depends on lengths only, so it is the same in each epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._planned != self.epoch:
            self._planned, self._plan = self.epoch, self._batches_of(self.epoch)
        batch = self._batch(self._plan[self.step])
        self.step += 1
        if self.step == self.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0
        return batch

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """(rows, slots) of this rank's batches; they depend on lengths only, so they are the same in each epoch."""
        batches = (rows[self._rank :: self.world] or [[]] for rows in self._plan)
        return {(len(mine), max(self._width(row) for row in mine)) for mine in batches}

    @property
    def samples_in_a_pair(self) -> int:
        """2 for pairs, 1 for samples."""
        return len(self._parts[0])

    def fixed(self, count: int | None = None) -> Iterator[Batch]:
        """The same batches at every call, for validation; does not change the position.

        Args:
            count: number of batches; None for each sample once.
        """
        for rows in self._batches_of(0)[:count]:
            yield self._batch(rows)

    def state_dict(self) -> dict[str, Any]:
        """The position and the settings of the order, as JSON values that are equal in all ranks."""
        return {"epoch": self.epoch, "step": self.step, **self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a position: the next batch is the one that came next when `state_dict` was called.

        Args:
            state: the return value of `state_dict`.

        Raises:
            RequestError: the state is of other data or settings, or is not a position.
        """
        for name, value in self._settings.items():
            if state.get(name) != value:
                raise RequestError(
                    f"the checkpoint is of another run: {name} is {state.get(name)!r:.20} there, and {value!r} here"
                )
        epoch, step = state.get("epoch"), state.get("step")
        if type(epoch) is not int or type(step) is not int or epoch < 0 or not 0 <= step < self.steps_per_epoch:
            position = f"epoch {epoch!r:.20} and step {step!r:.20}"
            raise RequestError(f"the checkpoint is damaged: {position} are not a position")
        self.epoch, self.step = epoch, step

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Everything that the order depends on; the samples by their hash."""
        data = hashlib.sha256()
        for parts in self._parts:
            for sample in parts:
                data.update(len(sample.ids).to_bytes(8, "little"))
                data.update(np.array(sample.ids, "<i4").tobytes() + bytes(sample.targets))
        return {
            "seed": self._seed,
            "batch_size": self._batch_size,
            "row_slots": self._capacity,
            "packing": self._packing,
            "samples": len(self._parts),
            "data_hash": data.hexdigest()[:16],
        }

    def _batches_of(self, epoch: int) -> list[list[Row]]:
        """The rows of each batch of an epoch."""
        # `random()` is the only method that gives the same numbers in every version of Python.
        draw = Random(f"{self._seed}:{epoch}").random
        by_chance = [draw() for _ in self._slots]
        order = sorted(range(len(self._slots)), key=lambda each: (-self._slots[each], by_chance[each]))
        rows = pack(order, self._slots, self._capacity) if self._packing else [[each] for each in order]
        rows.sort(key=lambda row: (-sum(self._slots[each] for each in row), draw()))
        batches = [rows[at : at + self._batch_size] for at in range(0, len(rows), self._batch_size)]
        return sorted(batches, key=lambda _: draw())

    def _width(self, row: Row) -> int:
        """Slots that a row takes, rounded up to a multiple of `WIDTH_STEP`."""
        taken = sum(self._slots[each] for each in row)
        return min(self._capacity, -(-max(taken, 1) // WIDTH_STEP) * WIDTH_STEP)

    def _batch(self, rows: Sequence[Row]) -> Batch:
        """The arrays of this rank's rows; with fewer rows than ranks, one row without targets."""
        mine = rows[self._rank :: self.world] or [[]]
        width = max(self._width(row) for row in mine)
        inputs, targets, segments = np.zeros((3, len(mine), width), np.int32)
        mask = np.zeros((len(mine), width), bool)
        for row, members in enumerate(mine):
            end = 0
            samples = [sample for each in members for sample in self._parts[each]]
            for number, sample in enumerate(samples, 1):
                start, end = end, end + len(sample.ids) - 1
                inputs[row, start:end], targets[row, start:end] = sample.ids[:-1], sample.ids[1:]
                mask[row, start:end], segments[row, start:end] = sample.targets[1:], number
        return Batch(mx.array(inputs), mx.array(targets), mx.array(mask), mx.array(segments))


def pack(order: Sequence[int], slots: Sequence[int], capacity: int) -> list[Row]:
    """Packs samples by best fit decreasing: each goes into the fullest row that has room for it.

    Args:
        order: indices of the samples, longest first.
        slots: slots that each sample takes, from 1 to `capacity`.
        capacity: slots of a row.

    Returns:
        The rows.
    """
    rows: list[Row] = []
    with_room: list[list[Row]] = [[] for _ in range(capacity + 1)]  # the rows by their free slots
    occupied = 0  # bit n is set if there is a row with n free slots
    for each in order:
        fitting = occupied >> slots[each]
        if fitting:
            room = slots[each] + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                occupied ^= 1 << room
        else:
            row, room = [], capacity
            rows.append(row)
        row.append(each)
        room -= slots[each]
        with_room[room].append(row)
        occupied |= 1 << room
    return rows

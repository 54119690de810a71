"""Samples -> batches of `batch_size` samples, in an order that follows from a seed and a position.

Samples of similar length share a batch, as in mlx-lm. The samples of a batch stand side by side in one row, numbered by
`segments`; the model gives each sample its own positions, its own RoPE table, and attention to itself only. So a batch
holds the tokens of its samples, and few empty slots.
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

from phi4_mlx.data.samples import Pair, Sample
from phi4_mlx.errors import RequestError
from phi4_mlx.models.attention import chunks

WIDTHS = 32  # row widths between a power of two and the next: with few shapes, freed buffers are reused
TOLERANCE = 0.1  # a mean batch that is smaller than this below `batch_size` becomes one that is larger, if by less

Shape = tuple[int, ...]
"""Tokens of each stretch of a batch that attention sees whole; their sum is the batch's number of slots."""


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
        batch_size: samples in a batch, over all ranks; where it does not divide their number, batches have fewer, or
            up to a tenth more.
        max_seq_length: most tokens of a sample.
        packing: True for one row per batch; else each sample has a row of its own. The order does not depend on it.
        seed: seed of the order.
        rank: number of this process, from 0; selects its samples of each batch.
        world: number of processes that train together.

    Attributes:
        epoch: number of completed epochs.
        step: number of batches of the current epoch that have been yielded.
        steps_per_epoch: batches in an epoch.
        batch_size: samples in a batch, over all ranks.
        max_seq_length: most tokens of a sample.
        world: number of processes that train together.

    Raises:
        RequestError: there are no samples, one is too long, or the ranks cannot share the batch size.
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
        self._lengths = [[len(sample.ids) - 1 for sample in parts] for parts in self._parts]
        self._slots = list(map(sum, self._lengths))
        for parts, lengths in zip(self._parts, self._lengths, strict=True):
            if not (sum(lengths) > 0 and max(lengths) <= max_seq_length):
                raise RequestError(f"{parts[0].source} takes {max(lengths):,} slots, of a sample's {max_seq_length:,}")
        self.batch_size, self.max_seq_length, self._packing, self._seed = batch_size, max_seq_length, packing, seed
        self._rank, self.world = rank, world
        self.epoch = self.step = 0
        self._planned, self._plan = 0, self._batches_of(0)
        self.steps_per_epoch = len(self._plan)

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
    def samples(self) -> int:
        """Number of samples, or pairs."""
        return len(self._parts)

    @property
    def tokens_per_batch(self) -> float:
        """Mean number of tokens in a batch of this process."""
        return sum(self._slots) / self.steps_per_epoch / self.world

    def shapes(self, batch_size: int | None = None, max_seq_length: int | None = None) -> set[Shape]:
        """The shapes of this rank's batches; they depend on lengths only, so they are the same in each epoch.

        Args:
            batch_size: the shapes under this one; None for the one that the batches have.
            max_seq_length: the shapes if longer samples were cut to this many tokens; None for no cut.
        """
        cut = [[min(length, max_seq_length or length) for length in lengths] for lengths in self._lengths]
        ordered = sorted(cut, key=sum, reverse=True)
        return {
            self._shape(ordered[begin:end][self._rank :: self.world])
            for begin, end in _bounds(len(ordered), batch_size or self.batch_size)
        }

    def number(self, count: int | None = None) -> int:
        """The number of batches that `fixed` yields."""
        return self.steps_per_epoch if count is None else min(count, self.steps_per_epoch)

    def fixed(self, count: int | None = None) -> Iterator[Batch]:
        """The same batches at every call, for validation; does not change the position.

        Args:
            count: number of batches; None for each sample once.
        """
        for members in self._batches_of(0)[:count]:
            yield self._batch(members)

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
                    f"the checkpoint is of another run: {name} is {state.get(name)!r:.20} there, and {value!r} here; "
                    "use the same data and settings, or leave --resume out and name another --adapter-path"
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
            "batch_size": self.batch_size,
            "samples": len(self._parts),
            "data_hash": data.hexdigest()[:16],
        }

    def _batches_of(self, epoch: int) -> list[list[int]]:
        """The samples of each batch of an epoch, by index, the longest first."""
        # `random()` is the only method that gives the same numbers in every version of Python.
        draw = Random(f"{self._seed}:{epoch}").random
        by_chance = [draw() for _ in self._slots]
        order = sorted(range(len(self._slots)), key=lambda each: (-self._slots[each], by_chance[each]))
        batches = [order[begin:end] for begin, end in _bounds(len(order), self.batch_size)]
        return sorted(batches, key=lambda _: draw())

    def _shape(self, members: Sequence[Sequence[int]]) -> Shape:
        """The shape of the batch of samples, or pairs, of these lengths."""
        if self._packing or not members:
            lengths = [length for each in members for length in each]
            width = rounded(sum(lengths))
            return tuple(chunks([*lengths, width - sum(lengths)]))
        return (rounded(max(map(sum, members))),) * len(members)

    def _batch(self, batch: Sequence[int]) -> Batch:
        """The arrays of this rank's samples; with fewer samples than ranks, one row without targets."""
        mine = batch[self._rank :: self.world]
        rows = [mine] if self._packing or not mine else [[each] for each in mine]
        width = rounded(max(sum(self._slots[each] for each in row) for row in rows))
        inputs, targets, segments = np.zeros((3, len(rows), width), np.int32)
        mask = np.zeros((len(rows), width), bool)
        for row, members in enumerate(rows):
            end = 0
            samples = [sample for each in members for sample in self._parts[each]]
            for number, sample in enumerate(samples, 1):
                start, end = end, end + len(sample.ids) - 1
                inputs[row, start:end], targets[row, start:end] = sample.ids[:-1], sample.ids[1:]
                mask[row, start:end], segments[row, start:end] = sample.targets[1:], number
        return Batch(mx.array(inputs), mx.array(targets), mx.array(mask), mx.array(segments))


def rounded(slots: int) -> int:
    """The width of a row for this many tokens: at least 1, and at most one in 32 slots is empty."""
    step = 1 << max(0, slots.bit_length() - WIDTHS.bit_length())
    return max(1, -(-slots // step) * step)


def _bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    """(begin, end) of each batch of `count` samples; batches differ by at most one sample."""
    batches = -(-count // batch_size)
    if count < (1 - TOLERANCE) * batches * batch_size and count <= (1 + TOLERANCE) * (batches - 1) * batch_size:
        batches -= 1
    return [(count * n // batches, count * (n + 1) // batches) for n in range(batches)]

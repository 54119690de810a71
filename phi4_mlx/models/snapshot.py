"""Snapshots of one sequence, to which a cache returns where tokens cannot be trimmed from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

MAX_SNAPSHOTS = 8  # of one sequence; each has the recurrent states and the windows of all layers


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The caches of all layers after the first `length` tokens of a sequence.

    Attributes:
        length: tokens.
        layers: the snapshot of each layer.
    """

    length: int
    layers: list[Any]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(int(part.nbytes) for _, part in tree_flatten(self.layers) if isinstance(part, mx.array))


class Snapshots:
    """At most `MAX_SNAPSHOTS` snapshots of one sequence, the shortest first.

    Args:
        snapshots: the first ones, in that order.
    """

    def __init__(self, snapshots: Iterable[Snapshot] = ()):
        self._snapshots = [*snapshots]

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._snapshots)

    def __len__(self) -> int:
        return len(self._snapshots)

    def add(self, snapshots: Iterable[Snapshot]) -> None:
        """Adds snapshots of the same sequence; of one length, the first is kept."""
        by_length = {each.length: each for each in [*snapshots, *self._snapshots]}
        self._snapshots = [by_length[length] for length in sorted(by_length)]
        self.thin(MAX_SNAPSHOTS)

    def thin(self, most: int) -> None:
        """Keeps at most `most`: the last, the first, and of the others those furthest behind the one before."""
        kept = self._snapshots
        while len(kept) > most:
            saved = {n: kept[n].length - kept[n - 1].length for n in range(1, len(kept) - 1)}
            del kept[min(saved, key=saved.__getitem__, default=0)]

    def latest(self, length: int) -> int:
        """The length of the longest snapshot of at most `length` tokens; 0 if there is none."""
        return max((each.length for each in self._snapshots if each.length <= length), default=0)

    def at(self, length: int) -> Snapshot:
        """The snapshot of that length, which must exist."""
        return next(each for each in self._snapshots if each.length == length)

    def drop_after(self, length: int) -> None:
        """Drops the snapshots of more than `length` tokens."""
        self._snapshots = [each for each in self._snapshots if each.length <= length]

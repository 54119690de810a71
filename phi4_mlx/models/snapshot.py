"""Snapshots of one sequence: the moments that a cache can return to where its tokens cannot be trimmed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

MAX_SNAPSHOTS = 8  # of one sequence; each takes as many bytes as the recurrent states of all layers


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The moment of a sequence after its first `length` tokens.

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
    """At most `MAX_SNAPSHOTS` moments of one sequence, the earliest first.

    Args:
        moments: those to begin with.
    """

    def __init__(self, moments: Iterable[Snapshot] = ()):
        self._moments = [*moments]

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def add(self, moments: Iterable[Snapshot]) -> None:
        """Adds moments of the same sequence, where there is none of that length yet."""
        by_length = {each.length: each for each in [*moments, *self._moments]}
        self._moments = [by_length[length] for length in sorted(by_length)]
        self.thin(MAX_SNAPSHOTS)

    def thin(self, most: int) -> None:
        """Keeps at most `most`: the last, the first, and between them those that save the most tokens."""
        kept = self._moments
        while len(kept) > most:
            saved = {n: kept[n].length - kept[n - 1].length for n in range(1, len(kept) - 1)}
            del kept[min(saved, key=saved.__getitem__, default=0)]

    def latest(self, length: int) -> int:
        """The length of the latest moment within the first `length` tokens; 0 without one."""
        return max((each.length for each in self._moments if each.length <= length), default=0)

    def at(self, length: int) -> Snapshot:
        """The moment of that length, which must be there."""
        return next(each for each in self._moments if each.length == length)

    def drop_after(self, length: int) -> None:
        """Drops the moments past the first `length` tokens."""
        self._moments = [each for each in self._moments if each.length <= length]

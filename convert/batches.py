"""Calibration text in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BATCH_TOKENS = 2048  # that run together: 0.3 MB of activations each in Phi-4-mini

Ids = Sequence[int]
"""The token ids of one sequence."""


@dataclass(frozen=True)
class Batch:
    """Sequences that run together, filled up on the right, where no token before sees them.

    Attributes:
        ids: [B, T].
        wanted: positions in the flattened batch of the tokens of the sequences.
    """

    ids: npt.NDArray[np.int64]
    wanted: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Ids]) -> Batch:
        """The batch of some sequences."""
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        inside = np.zeros(ids.shape, bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)], inside[number, : len(row)] = row, True
        return cls(ids, np.flatnonzero(inside))


def batches(rows: Sequence[Ids], boundary: int | None) -> list[Batch]:
    """Puts sequences of similar length, and of one RoPE table, into batches.

    Args:
        rows: the sequences.
        boundary: the longest under the short RoPE table; None for a model with one table.
    """
    found: list[Batch] = []
    some: list[Ids] = []
    ordered = sorted(rows, key=len)
    for row, following in zip(ordered, [*ordered[1:], ()], strict=True):
        some.append(row)
        crosses = boundary is not None and len(row) <= boundary < len(following)
        if not following or crosses or (len(some) + 1) * len(following) > BATCH_TOKENS:
            found.append(Batch.of(some))
            some = []
    return found


def spread(rows: Sequence[Ids], most: int) -> list[Ids]:
    """Some of the sequences, evenly spaced, with at most `most` tokens together."""
    total = sum(map(len, rows))
    found: list[Ids] = []
    seen = taken = 0
    for row in rows:
        seen += len(row)
        if (taken + len(row)) * total <= most * seen or total <= most:
            found.append(row)
            taken += len(row)
    return found or [rows[0][:most]]

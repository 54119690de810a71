"""The logits of a head that is split by vocabulary, as far as a draw needs them: the likeliest of each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

_BLOCK = 64  # logits whose maximum is looked at first


class SplitHead(Protocol):
    """A model whose head is split."""

    def candidates(self, hidden: mx.array, count: int, temps: tuple[float, ...] = ()) -> SplitLogits:
        """See `LanguageModel.candidates`."""

    def logits(self, hidden: mx.array) -> mx.array:
        """See `LanguageModel.logits`."""


def top(logits: mx.array, count: int, first: int, temps: Sequence[float] = ()) -> mx.array:
    """The likeliest of a rank's logits, and the mass of the others.

    Args:
        logits: float32 [n, V of the rank].
        count: of the likeliest, at most V of the rank.
        first: the id of the first logit.
        temps: the temperature of each row, for the mass of the others; 1 for all if empty.

    Returns:
        float32 [n, 2 count + 2]: their values, their ids, and the log-sum-exp of the others at temperature 1 and at the
        row's.
    """
    ids = _likeliest(logits, count)
    values = mx.take_along_axis(logits, ids, axis=-1)
    others = mx.put_along_axis(logits, ids, mx.array(-mx.inf), axis=-1)
    masses = [mx.logsumexp(others, axis=-1, keepdims=True)] * 2
    if temps:
        masses[1] = mx.logsumexp(others / mx.array(temps)[:, None], axis=-1, keepdims=True)
    return mx.concatenate([values, (ids + first).astype(mx.float32), *masses], axis=-1)


def _likeliest(logits: mx.array, count: int) -> mx.array:
    """The places of the largest numbers of each row [n, count]: within the blocks with the largest maxima."""
    n, V = logits.shape
    if count == 1:
        return mx.argmax(logits, axis=-1, keepdims=True)
    blocks = -(-V // _BLOCK)
    if count >= blocks:
        return mx.argpartition(-logits, min(count, V - 1), axis=-1)[:, :count]
    padded = mx.pad(logits, [(0, 0), (0, blocks * _BLOCK - V)], constant_values=-mx.inf).reshape(n, blocks, _BLOCK)
    best = mx.argpartition(-padded.max(axis=-1), count - 1, axis=-1)[:, :count, None]  # [n, count, 1]
    inside = mx.take_along_axis(padded, best, axis=1).reshape(n, -1)
    places = (best * _BLOCK + mx.arange(_BLOCK)).reshape(n, -1)
    chosen = mx.argpartition(-inside, count - 1, axis=-1)[:, :count]
    return mx.take_along_axis(places, chosen, axis=-1)


@dataclass(frozen=True, eq=False)
class SplitLogits:
    """The likeliest logits of each rank for n rows, and bounds of the others.

    Attributes:
        model: which has them.
        hidden: that they are of, [..., D], n rows in all.
        gathered: what `top` found on each rank, [size, n, 2 count + 2].
        count: of the likeliest on each rank.
        temps: of the rows.
        parts: the range of ids of each rank.
        rows: those that this is about; None for all n.
    """

    model: SplitHead
    hidden: mx.array
    gathered: mx.array
    count: int
    temps: tuple[float, ...]
    parts: tuple[tuple[int, int], ...]
    rows: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.gathered.shape[1] if self.rows is None else len(self.rows)

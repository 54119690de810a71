"""The logits of a head that is split by vocabulary, as far as a draw needs them: the likeliest of each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import mlx.core as mx

LEAST = 32  # logits of each rank that every draw gathers; a server reports up to 20 with a token
_MORE = 16  # times as many are gathered where those do not settle a draw
_BLOCK = 64  # logits whose maximum is looked at first

Change = Callable[[mx.array], mx.array]  # logits [1, V] -> logits [1, V], each of which grows with the given one


class SplitHead(Protocol):
    """A model whose head is split."""

    def candidates(self, hidden: mx.array, count: int = LEAST, temps: Sequence[float] = ()) -> Logits:
        """See `LanguageModel.candidates`."""

    def logits(self, hidden: mx.array) -> mx.array:
        """See `LanguageModel.logits`."""


def top(logits: mx.array, count: int, first: int, temps: Sequence[float] = ()) -> mx.array:
    """The likeliest of a rank's logits, and the mass of the others.

    Args:
        logits: float32 [n, V of the rank].
        count: of the likeliest, at most V of the rank.
        first: the id of the first logit.
        temps: the temperature of each row, or one for all, for the mass of the others; 1 if empty.

    Returns:
        float32 [n, 2 count + 2]: their values, their ids, and the log-sum-exp of the others at temperature 1 and at the
        row's.
    """
    ids = likeliest(logits, count)
    values = mx.take_along_axis(logits, ids, axis=-1)
    others = mx.put_along_axis(logits, ids, mx.array(-mx.inf), axis=-1)
    masses = [mx.logsumexp(others, axis=-1, keepdims=True)] * 2
    if temps:
        masses[1] = mx.logsumexp(others / mx.array(temps)[:, None], axis=-1, keepdims=True)
    return mx.concatenate([values, (ids + first).astype(mx.float32), *masses], axis=-1)


def likeliest(logits: mx.array, count: int) -> mx.array:
    """The places of the largest numbers of each row [n, count], of equal ones the first.

    They stand in the `count` blocks with the largest maxima, of equal ones the first.
    """
    n, V = logits.shape
    if count == 1:
        return mx.argmax(logits, axis=-1, keepdims=True)
    blocks = -(-V // _BLOCK)
    if count >= blocks:
        return mx.argsort(-logits, axis=-1)[:, :count]
    padded = mx.pad(logits, [(0, 0), (0, blocks * _BLOCK - V)], constant_values=-mx.inf).reshape(n, blocks, _BLOCK)
    best = mx.sort(mx.argsort(-padded.max(axis=-1), axis=-1)[:, :count], axis=-1)[..., None]  # [n, count, 1]
    inside = mx.take_along_axis(padded, best, axis=1).reshape(n, -1)
    places = (best * _BLOCK + mx.arange(_BLOCK)).reshape(n, -1)
    chosen = mx.argsort(-inside, axis=-1)[:, :count]
    return mx.take_along_axis(places, chosen, axis=-1)


@dataclass(frozen=True, eq=False)
class SplitLogits:
    """The likeliest logits of each rank for some rows, and bounds of the others.

    Attributes:
        model: has the head.
        hidden: what the logits are of, [..., D].
        gathered: what `top` found on each rank, [size, rows of hidden, 2 count + 2].
        temps: of the rows of `hidden`, or one for all, for the mass of the others; 1 if empty.
        parts: the range of ids of each rank.
        rows: the rows of `hidden` that this is about.
        changes: of the logits of each row; None for none.
    """

    model: SplitHead
    hidden: mx.array
    gathered: mx.array
    temps: tuple[float, ...]
    parts: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    changes: tuple[Change | None, ...]

    @classmethod
    def of(
        cls,
        model: SplitHead,
        hidden: mx.array,
        gathered: mx.array,
        temps: Sequence[float],
        parts: Sequence[tuple[int, int]],
    ) -> SplitLogits:
        """Those of all rows of `hidden`."""
        rows = tuple(range(gathered.shape[1]))
        return cls(model, hidden, gathered, tuple(temps), tuple(parts), rows, (None,) * len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | mx.array) -> SplitLogits:
        """Some of the rows."""
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        return replace(
            self, rows=tuple(self.rows[each] for each in numbers), changes=tuple(self.changes[each] for each in numbers)
        )

    def changed(self, change: Change) -> SplitLogits:
        """The same row after a change, as penalties make; there must be one."""
        assert self.changes == (None,)
        return replace(self, changes=(change,))

    @staticmethod
    def joined(parts: Sequence[SplitLogits]) -> SplitLogits:
        """The rows of several, of the same hidden states."""
        rows = tuple(row for part in parts for row in part.rows)
        return replace(parts[0], rows=rows, changes=tuple(change for part in parts for change in part.changes))

    @property
    def count(self) -> int:
        """Logits known of each rank."""
        return int(self.gathered.shape[2] - 2) // 2

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the logits."""
        return self.hidden.dtype

    @property
    def known(self) -> tuple[mx.array, mx.array]:
        """Values [n, size * count], unchanged, and their ids, in the order of the ids."""
        found = self.gathered[:, mx.array(self.rows)]  # [size, n, 2 count + 2]
        flat = found[..., : 2 * self.count].swapaxes(0, 1).reshape(len(self), -1, 2, self.count)
        values, ids = (flat[:, :, each].reshape(len(self), -1) for each in (0, 1))
        order = mx.argsort(ids, axis=-1)
        return mx.take_along_axis(values, order, axis=-1), mx.take_along_axis(ids, order, axis=-1).astype(mx.int32)

    @property
    def others(self) -> tuple[mx.array, mx.array]:
        """The log-sum-exp of unchanged logits that are not known, at temperature 1 and at the row's, [n, 1] each."""
        masses = mx.logsumexp(self.gathered[:, mx.array(self.rows), -2:], axis=0)
        return masses[:, :1], masses[:, 1:]

    @property
    def bounds(self) -> mx.array:
        """Unchanged logits [n, V]: those that are known, and for the others a number that they do not exceed."""
        least = self.gathered[:, mx.array(self.rows), : self.count].min(axis=-1)  # [size, n]
        filled = [
            mx.broadcast_to(least[rank][:, None], (len(self), end - start))
            for rank, (start, end) in enumerate(self.parts)
        ]
        values, ids = self.known
        return mx.put_along_axis(mx.concatenate(filled, axis=-1), ids, values, axis=-1)

    def apply_changes(self, logits: mx.array) -> mx.array:
        """Logits [n, V] after the changes of their rows."""
        if not any(self.changes):
            return logits
        rows = (logits[n : n + 1] for n in range(len(self)))
        return mx.concatenate(
            [row if change is None else change(row) for row, change in zip(rows, self.changes, strict=True)]
        )

    def more(self) -> Logits:
        """The same with more of each rank's logits; all of them [n, V], with their changes, where that is most."""
        count = self.count * _MORE
        if count < min(end - start for start, end in self.parts):
            found = self.model.candidates(self.hidden, count, self.temps)
            assert isinstance(found, SplitLogits)
            return replace(found, rows=self.rows, changes=self.changes)
        return self.whole()

    def whole(self) -> mx.array:
        """All logits [n, V], with their changes."""
        logits = self.model.logits(self.hidden).reshape(-1, self.parts[-1][1])
        return self.apply_changes(logits[mx.array(self.rows)])


Logits: TypeAlias = mx.array | SplitLogits
"""What a draw looks at: all logits [n, V], or those of a split head."""


def array_of(logits: Logits) -> mx.array:
    """The array to compute before a draw from logits; ranks that split the head compute it together."""
    return logits.gathered if isinstance(logits, SplitLogits) else logits

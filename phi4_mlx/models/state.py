"""Caches of layers that do not keep every token: a recurrent state, and the keys and values of a window.

Tokens cannot be taken back from them, but MLX's arrays never change, so a snapshot is a reference to them.

Shapes: B batch, S cached tokens, E inner width of a state-space layer, N state size, K key/value heads, Dh head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import mlx.core as mx

from phi4_mlx.models.cache import KVCache

Own = TypeVar("Own", bound="_Arrays")


class _Arrays:
    """What the caches of this file share: arrays with a row a sequence, and the number of tokens behind them."""

    rewindable = False
    state_names: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.arrays: list[mx.array] = []
        self.offset = 0

    @property
    def state(self) -> Sequence[mx.array]:
        """The arrays and the number of tokens; empty before the first token."""
        return [*self.arrays, mx.array([self.offset])] if self.arrays else []

    @state.setter
    def state(self, state: Sequence[mx.array]) -> None:
        self.arrays, self.offset = (list(state[:-1]), int(state[-1].item())) if len(state) else ([], 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(int(array.nbytes) for array in self.arrays)

    def is_trimmable(self) -> bool:
        """False: what a token has changed is not kept."""
        return False

    def trim(self, n: int) -> int:
        """Takes back all tokens if n is at least their number, else none; returns how many it took."""
        if n < self.offset:
            return 0
        n, self.arrays, self.offset = self.offset, [], 0
        return n

    def snapshot(self) -> tuple[list[mx.array], int]:
        """The arrays of this moment."""
        return self.arrays, self.offset

    def restore(self, snapshot: tuple[list[mx.array], int]) -> None:
        """Goes back to the moment of a snapshot."""
        self.arrays, self.offset = snapshot

    def fork(self: Own, length: int) -> Own:
        """Another cache over the same arrays; `length` must be all of it."""
        assert length == self.offset
        twin = type(self)()
        twin.arrays, twin.offset = self.arrays, self.offset
        return twin

    def compact(self) -> None:
        """Copies the arrays out of larger buffers."""
        self.arrays = [mx.contiguous(array) for array in self.arrays]


class RecurrentCache(_Arrays):
    """The state of a Mamba layer: its last inputs of the convolution [B, 3, E], and h [B, N, E] in float32."""

    state_names = ("conv", "state", "length")

    def make_mask(self, N: int) -> None:
        """None: a recurrence masks nothing."""

    def join(self, members: Sequence[RecurrentCache], columns: int) -> None:
        """Takes over the rows of `members`, one below the other."""
        self.arrays = [mx.concatenate(arrays) for arrays in zip(*(each.arrays for each in members), strict=True)]
        self.offset = columns

    def keep(self, rows: Sequence[int], start: int) -> None:
        """Keeps these rows, in this order."""
        index = mx.array(rows)
        self.arrays = [array[index] for array in self.arrays] if rows else []
        self.offset = self.offset - start if rows else 0

    def row(self, number: int, start: int) -> Sequence[mx.array]:
        """The `state` of one row, whose sequence begins at column `start`."""
        return [*(array[number : number + 1] for array in self.arrays), mx.array([self.offset - start])]


class WindowCache(KVCache):
    """Keys and values of a layer whose queries see a window: the last `window` - 1 tokens, and up to `STEP` older ones.

    Args:
        window: tokens that a query sees, its own included.
    """

    SINK = 0
    state_names = ("keys", "values", "length")

    def __init__(self, window: int) -> None:
        super().__init__(max_size=window - 1 + self.STEP)
        self.window = window

    @property
    def state(self) -> Sequence[mx.array]:
        """Keys and values of the window [.., S, Dh], and the number of tokens; empty before the first token."""
        start = max(0, self._filled - (self.window - 1))
        return [*(b[:, :, start : self._filled] for b in self._buffers), mx.array([self.offset])] if self._buffers else []

    @state.setter
    def state(self, state: Sequence[mx.array]) -> None:
        self._buffers = list(state[:-1])
        self._filled = state[0].shape[2] if len(state) else 0
        self._dropped = int(state[-1].item()) - self._filled if len(state) else 0

    def is_trimmable(self) -> bool:
        """False: a window that has moved on does not come back."""
        return False

    def snapshot(self) -> tuple[list[mx.array], int, int]:
        """The arrays of this moment, which later tokens do not change."""
        return [*self._buffers], self._filled, self._dropped

    def restore(self, snapshot: tuple[list[mx.array], int, int]) -> None:
        """Goes back to the moment of a snapshot."""
        self._buffers, self._filled, self._dropped = [*snapshot[0]], *snapshot[1:]

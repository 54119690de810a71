"""Caches of layers that do not keep every token: a recurrent state, and the keys and values of a window.

Tokens cannot be taken back from them, but MLX's arrays never change, so a snapshot is a reference to them.

Shapes: B batch, S cached tokens, E inner width of a state-space layer, N state size, K key/value heads, Dh head dim.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import mlx.core as mx

from phi4_mlx.models.cache import REWIND, Mask, appended
from phi4_mlx.models.safe import safe

Cache = TypeVar("Cache", bound="SnapshotCache")


class SnapshotCache(ABC):
    """A cache that can take back the tokens of the latest short pass; to go back further, it restores a snapshot."""

    rewindable = True
    offset: int

    @property
    @abstractmethod
    def arrays(self) -> list[mx.array]:
        """The arrays that later tokens need; empty before the first token."""

    @abstractmethod
    def _set(self, arrays: Sequence[mx.array], offset: int) -> None:
        """Replaces everything cached by `arrays`, of `offset` tokens."""

    @abstractmethod
    def can_trim(self, n: int) -> bool:
        """True if the last n tokens can be taken back now."""

    @abstractmethod
    def _take_back(self, n: int) -> None:
        """Takes back the last n tokens, which `can_trim`."""

    @property
    def state(self) -> Sequence[mx.array]:
        """The arrays, and the number of tokens; empty before the first one."""
        return [*self.arrays, mx.array([self.offset])] if self.offset else []

    @state.setter
    def state(self, state: Sequence[mx.array]) -> None:
        self._set(state[:-1], int(state[-1].item()) if len(state) else 0)

    def is_trimmable(self) -> bool:
        """False: what earlier passes left is gone."""
        return False

    def trim(self, n: int) -> int:
        """Takes back the last n tokens; returns how many it took: n, all of them, or 0 where that is not possible.

        Drops what only the latest pass could take back, also for n = 0.
        """
        n = min(n, self.offset)
        if n < 0 or not (n == self.offset or self.can_trim(n)):
            return 0
        if n == self.offset:
            self._set([], 0)
        else:
            self._take_back(n)
        return n

    def snapshot(self) -> tuple[list[mx.array], int]:
        """The arrays and the number of tokens; later tokens do not change them."""
        return self.arrays, self.offset

    def restore(self, snapshot: tuple[list[mx.array], int]) -> None:
        """Returns to a snapshot."""
        self._set(*snapshot)

    def fork(self: Cache, length: int) -> Cache:
        """Another cache over the same arrays; `length` must be all of it."""
        assert length == self.offset
        twin = copy.copy(self)
        twin.restore(self.snapshot())
        return twin

    def compact(self) -> None:
        """Copies the arrays out of larger buffers, and drops what only the latest pass could take back."""
        self._set([mx.contiguous(array) for array in self.arrays], self.offset)


class RecurrentCache(SnapshotCache):
    """The state of a Mamba layer: the last inputs of its convolution [B, taps - 1, E], and h [B, N, E] in float32.

    After a pass of at most `REWIND` tokens it also has the state after each of them, so that some can be taken back.

    Args:
        taps: taps of the convolution.
    """

    state_names = ("conv", "state", "length")

    def __init__(self, taps: int) -> None:
        self._before = taps - 1
        self._inputs: mx.array | None = None  # of the latest pass, and those before it that the convolution needs
        self._states: list[mx.array] = []  # after each token of the latest pass, or after the last one alone
        self.offset = 0

    @property
    def arrays(self) -> list[mx.array]:
        """The inputs of the convolution and h; empty before the first token."""
        return [] if self._inputs is None else [self._tail(0), self._states[-1]]

    def update(self, inputs: mx.array, states: list[mx.array]) -> None:
        """Stores the results of a pass of T tokens.

        Args:
            inputs: the convolution's, [B, taps - 1 + T, E].
            states: the state after each token, or after the last one alone; [B, N, E] each.
        """
        T = inputs.shape[1] - self._before
        self.offset += T
        self._inputs, self._states = inputs, states
        if len(states) == 1:
            tail = self._tail(0)
            self._inputs = tail if T == 1 else mx.contiguous(tail)  # a slice would keep all inputs alive

    def _tail(self, n: int) -> mx.array:
        """The inputs before the last n."""
        assert self._inputs is not None
        end = self._inputs.shape[1] - n
        return self._inputs[:, end - self._before : end]

    def _set(self, arrays: Sequence[mx.array], offset: int) -> None:
        self._inputs, self._states = (arrays[0], [arrays[1]]) if len(arrays) else (None, [])
        self.offset = offset

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return 0 if self._inputs is None else sum(int(each.nbytes) for each in [self._inputs, *self._states])

    def make_mask(self, N: int) -> None:
        """None: a recurrence masks nothing."""

    def can_trim(self, n: int) -> bool:
        """True if the last n tokens are in the latest pass, and its states are kept."""
        return n < len(self._states)

    def _take_back(self, n: int) -> None:
        self._set([self._tail(n), self._states[-1 - n]], self.offset - n)

    def kept(self, length: int) -> int:
        """1: a recurrent state has the same size after any number of tokens."""
        return 1

    def join(self, members: Sequence[RecurrentCache], columns: int) -> None:
        """Takes over the rows of `members`, one below the other."""
        self._set([mx.concatenate(each) for each in zip(*(member.arrays for member in members), strict=True)], columns)

    def keep(self, rows: Sequence[int], start: int) -> None:
        """Keeps these rows, in this order."""
        index = mx.array(rows)
        self._set([array[index] for array in self.arrays] if rows else [], self.offset - start if rows else 0)

    def row(self, number: int, start: int) -> Sequence[mx.array]:
        """The `state` of one row, whose sequence begins at column `start`."""
        return [*(array[number : number + 1] for array in self.arrays), mx.array([self.offset - start])]


class WindowCache(SnapshotCache):
    """Keys [B, K, S, Dh] and values of a layer whose queries see a window.

    It keeps the last `window` - 1 tokens, and in a buffer that is filled before it moves on, up to `STEP` older ones,
    so that the tokens of a short pass can be taken back.

    Args:
        window: tokens that a query sees, its own included.
    """

    STEP = REWIND
    state_names = ("keys", "values", "length")

    def __init__(self, window: int) -> None:
        self.window = window
        self._buffers: list[mx.array] = []  # keys, values
        self._filled = 0
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends keys and values of T tokens; returns those that the new ones see."""
        if safe("buffers"):
            self._set(appended(self.arrays, [keys, values]), self.offset + keys.shape[2])
            return self._buffers[0], self._buffers[1]
        return self._written(keys, values)

    def _written(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """`update_and_fetch` by writes into the buffers."""
        T, new = keys.shape[2], [keys, values]
        if not self._buffers or self._filled + T > self._buffers[0].shape[2]:
            room = T if T > self.STEP else self.STEP
            kept = self.arrays
            self._filled = kept[0].shape[2] if kept else 0
            self._buffers = [
                mx.concatenate([*kept[i : i + 1], mx.zeros((*each.shape[:2], room, each.shape[3]), each.dtype)], axis=2)
                for i, each in enumerate(new)
            ]
        start, end = self._filled, self._filled + T
        for buffer, part in zip(self._buffers, new, strict=True):
            buffer[:, :, start:end] = part
        self._filled, self.offset = end, self.offset + T
        first = max(0, start - (self.window - 1))
        fetched = [buffer[:, :, first:end] for buffer in self._buffers]
        if T > self.STEP:  # a buffer for a long prompt is not kept, and a slice would keep it in memory
            self._buffers = [mx.contiguous(array) for array in self.arrays]
            self._filled = self._buffers[0].shape[2]
        return fetched[0], fetched[1]

    @property
    def arrays(self) -> list[mx.array]:
        """Keys and values of the last `window` - 1 tokens; empty before the first token."""
        start = max(0, self._filled - (self.window - 1))
        return [buffer[:, :, start : self._filled] for buffer in self._buffers]

    def _set(self, arrays: Sequence[mx.array], offset: int) -> None:
        self._buffers, self.offset = [*arrays], offset
        self._filled = arrays[0].shape[2] if len(arrays) else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(int(buffer.nbytes) for buffer in self._buffers)

    def make_mask(self, N: int) -> Mask:
        """Causal; the layer itself cuts the window."""
        return None if N == 1 else "causal"

    def can_trim(self, n: int) -> bool:
        """True if the window before the last n tokens is still whole."""
        return n <= self._filled and (self._filled == self.offset or self._filled - n >= self.window - 1)

    def _take_back(self, n: int) -> None:
        self._filled, self.offset = self._filled - n, self.offset - n

    def kept(self, length: int) -> int:
        """The number of positions in `state` when `length` tokens have been appended: at most the window's."""
        return min(length, self.window - 1)

    def join(self, members: Sequence[WindowCache], columns: int) -> None:
        """Takes over the rows of `members`, one below the other, right-aligned."""
        windows = [member.arrays for member in members]
        widest = max(keys.shape[2] for keys, _ in windows)
        rows = zip(*windows, strict=True)
        self._set([mx.concatenate([_padded(each, widest) for each in arrays]) for arrays in rows], columns)

    def keep(self, rows: Sequence[int], start: int) -> None:
        """Keeps these rows, in this order, from column `start` on."""
        index, window = mx.array(rows), self.arrays
        cut = self._cut(start)
        self._set([each[index, :, cut:] for each in window] if rows else [], self.offset - start if rows else 0)

    def row(self, number: int, start: int) -> Sequence[mx.array]:
        """The `state` of one row, from column `start` on."""
        cut = self._cut(start)
        rows = [array[number : number + 1, :, cut:] for array in self.arrays]
        return [*rows, mx.array([self.offset - start])]

    def _cut(self, start: int) -> int:
        """Columns of the window before column `start` of the batch."""
        return max(0, start - (self.offset - min(self._filled, self.window - 1)))


def _padded(array: mx.array, columns: int) -> mx.array:
    return mx.pad(array, [(0, 0), (0, 0), (columns - array.shape[2], 0), (0, 0)])

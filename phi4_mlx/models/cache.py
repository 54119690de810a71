"""Caches of one layer: what any of them can do, and keys and values.

`KVCache` keeps mlx-lm's duck type, so that mlx-lm's own tools work on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import mlx.core as mx

from phi4_mlx.errors import RequestError, check_whole
from phi4_mlx.models.rope import Regime
from phi4_mlx.models.safe import safe

Mask: TypeAlias = "str | mx.array | None"  # "causal", bool [.., T, S], or None where every query sees every key
REWIND = 32  # tokens of a pass that can be taken back where a cache keeps the states between them
Quantized: TypeAlias = "tuple[mx.array, mx.array, mx.array]"  # weights, scales and biases from `mx.quantize`


@dataclass(frozen=True)
class CacheOptions:
    """The kind of cache to make; the arguments of `make_cache`.

    Raises:
        RequestError: a value is outside its range.
    """

    regime: Regime | None = None
    kv_bits: int | None = None
    max_kv_size: int | None = None

    def __post_init__(self) -> None:
        if self.regime not in (None, "short", "long"):
            raise RequestError(f"regime {self.regime!r} is unknown; use short or long, or None to choose by the length")
        if self.kv_bits is not None and (type(self.kv_bits) is not int or self.kv_bits not in (4, 8)):
            raise RequestError(f"kv_bits {self.kv_bits!r} is unknown; use 4 or 8, or None for no quantisation")
        if self.max_kv_size is not None:
            check_whole("max_kv_size", self.max_kv_size, 2 * KVCache.STEP)


class LayerCache(Protocol):
    """The cached state of one layer, in mlx-lm's names where mlx-lm has the thing."""

    @property
    def offset(self) -> int:
        """Tokens appended and not taken back: the position of the next one."""

    @property
    def state(self) -> Sequence[mx.array]:
        """The filled part of all arrays; assigning it replaces what is cached."""

    @state.setter
    def state(self, state: Sequence[mx.array]) -> None: ...

    @property
    def state_names(self) -> tuple[str, ...]:
        """A name for each array of `state`, for files."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""

    @property
    def rewindable(self) -> bool:
        """True if the tokens of a pass of at most `REWIND` can be taken back after it; speculation needs that."""

    def can_trim(self, n: int) -> bool:
        """True if the last n tokens can be taken back now."""

    def is_trimmable(self) -> bool:
        """True if `trim` can take back some tokens and keep the others; `state` then has a column a token, axis 2."""

    def trim(self, n: int) -> int:
        """Takes back the last n tokens and returns how many it took: all, n, or 0 where that is not possible."""

    def make_mask(self, N: int) -> Mask:
        """The attention mask of the next N tokens."""

    def fork(self, length: int) -> LayerCache:
        """Another cache of the first `length` tokens, over the same arrays; all of them unless `is_trimmable`."""

    def compact(self) -> None:
        """Copies the filled part out of larger buffers."""

    def snapshot(self) -> Any:
        """A cheap record of this moment for `restore`; None if there can be none. It owns the memory of its arrays."""

    def restore(self, snapshot: Any) -> None:
        """Goes back to the moment of a snapshot."""

    def kept(self, length: int) -> int:
        """The number of positions in `state` when `length` tokens have been appended."""

    def join(self, members: Sequence[Any], columns: int) -> None:
        """Takes over the rows of `members`, one below the other, right-aligned in `columns` columns."""

    def keep(self, rows: Sequence[int], start: int) -> None:
        """Keeps these rows, in this order, from column `start` on."""

    def row(self, number: int, start: int) -> Sequence[mx.array]:
        """The `state` of one row, from column `start` on."""


def group_size(head_dim: int) -> int:
    """Elements of a head that share a scale and a bias when quantised."""
    return 64 if head_dim % 64 == 0 else 32


def buffer_length(num_tokens: int) -> int:
    """Positions of the buffer for `num_tokens` tokens.

    Always leave a spare slot: a full buffer would alias the caller's array and keep its parent alive.
    """
    return (num_tokens // KVCache.STEP + 1) * KVCache.STEP


def appended(old: Sequence[mx.array], new: Sequence[mx.array]) -> list[mx.array]:
    """Arrays [B, K, S, Dh] with new positions behind the old ones, if there are any, in memory of their own."""
    return [mx.concatenate([*pair], axis=2) for pair in (zip(old, new, strict=True) if old else zip(new, strict=True))]


class KVCache:
    """Keys and values of one layer, [B, K, S, Dh] each, in buffers that grow `STEP` positions at a time.

    Args:
        bits: 4 or 8 quantises in groups of 64 or 32 along Dh; None does not.
        max_size: the most tokens to keep. When more come, the oldest `STEP` are dropped, except the first `SINK`
            (attention sinks: Xiao et al. 2023, "Efficient streaming language models with attention sinks"). None keeps
            all. A chunk of new tokens always sees all of itself.
    """

    STEP = 256
    SINK = 4

    def __init__(self, bits: int | None = None, max_size: int | None = None) -> None:
        self.bits, self.max_size = bits, max_size
        self._buffers: list[mx.array] = []  # keys, values; if quantised, weights, scales and biases of each
        self._filled = 0
        self._dropped = 0

    @property
    def offset(self) -> int:
        """Tokens appended and not taken back: the position of the next one."""
        return self._filled + self._dropped

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Appends keys and values [B, K, T, Dh]; returns all of them, [B, K, S, Dh], or `Quantized` triples."""
        T = keys.shape[2]
        if self.max_size is not None and self._filled + T > self.max_size:
            self._drop(self._filled - (self.max_size - self.STEP))
        start, end = self._filled, self._filled + T
        new = [keys, values] if self.bits is None else [*self._quantized(keys), *self._quantized(values)]
        if safe("buffers"):
            filled = self._buffers = appended(self.state, new)
        else:
            filled = self._written(start, new)
        self._filled = end
        return (filled[0], filled[1]) if self.bits is None else (tuple(filled[:3]), tuple(filled[3:]))

    def _written(self, start: int, new: Sequence[mx.array]) -> list[mx.array]:
        """Writes into the buffers, which grow where they must; returns their filled part."""
        end, filled = start + new[0].shape[2], []
        if not self._buffers or end > self._buffers[0].shape[2]:
            self._buffers = [self._grown(*pair) for pair in zip(self._buffers or [None] * len(new), new, strict=True)]
        for buffer, part in zip(self._buffers, new, strict=True):
            buffer[:, :, start:end] = part
            filled.append(buffer[:, :, :end])
        return filled

    def _quantized(self, array: mx.array) -> Sequence[mx.array]:
        return list(mx.quantize(array, group_size=group_size(array.shape[-1]), bits=self.bits))

    def _grown(self, buffer: mx.array | None, new: mx.array) -> mx.array:
        B, K, T, width = new.shape
        room = mx.zeros((B, K, buffer_length(T), width), new.dtype)
        return room if buffer is None else mx.concatenate([buffer[:, :, : self._filled], room], axis=2)

    def _drop(self, n: int) -> None:
        if n <= 0:
            return
        first, last = self.SINK + n, self._filled
        self._buffers = [mx.concatenate([b[:, :, : self.SINK], b[:, :, first:last]], axis=2) for b in self._buffers]
        self._filled, self._dropped = self._filled - n, self._dropped + n

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The attention mask of the next N tokens: causal over everything before. mlx-lm's signature."""
        if window_size is not None:
            raise RequestError(f"this cache does not support attention in a window (window_size is {window_size})")
        if return_array:
            return mx.arange(self._filled, self._filled + N)[:, None] >= mx.arange(self._filled + N)
        return None if N == 1 else "causal"

    @property
    def state(self) -> Sequence[mx.array]:
        """The filled part of keys and values, [B, K, S, Dh] each; empty before the first token."""
        return [buffer[:, :, : self._filled] for buffer in self._buffers]

    @state.setter
    def state(self, state: Sequence[mx.array]) -> None:
        self._buffers = list(state)
        self._filled, self._dropped = (state[0].shape[2] if len(state) else 0), 0

    @property
    def state_names(self) -> tuple[str, ...]:
        """The name of each array of `state`."""
        if self.bits is None:
            return "keys", "values"
        return "keys", "keys.scales", "keys.biases", "values", "values.scales", "values.biases"

    @property
    def meta_state(self) -> str:
        """Empty: `state` holds everything; mlx-lm's name."""
        return ""

    @meta_state.setter
    def meta_state(self, value: str) -> None:
        if value:
            raise ValueError("this cache keeps no meta state")

    @property
    def rewindable(self) -> bool:
        """True without a `max_size`: dropped tokens do not come back."""
        return self.max_size is None

    def can_trim(self, n: int) -> bool:
        """True if the last n tokens can be taken back now."""
        return self.is_trimmable()

    def is_trimmable(self) -> bool:
        """True until the oldest tokens have been dropped."""
        return self._dropped == 0

    def trim(self, n: int) -> int:
        """Takes back the last n tokens; returns how many it took."""
        if n >= self.offset:
            n, self._filled, self._dropped = self.offset, 0, 0
        elif n > 0 and self.is_trimmable():
            self._filled -= n
        else:
            n = 0
        return n

    def snapshot(self) -> int | None:
        """The length: what follows is appended, so that trimming restores it. None with a `max_size`."""
        return self._filled if self.rewindable else None

    def restore(self, snapshot: int) -> None:
        """Goes back to the length of a snapshot."""
        self._filled = snapshot

    def fork(self, length: int) -> KVCache:
        """Another cache of the first `length` tokens, over the same arrays."""
        twin = KVCache(self.bits, self.max_size)
        twin.state = [array[:, :, : length - self._dropped] for array in self.state]
        twin._dropped = self._dropped
        return twin

    def compact(self) -> None:
        """Copies the filled part out of larger buffers."""
        self._buffers = [mx.contiguous(array) for array in self.state]

    def kept(self, length: int) -> int:
        """The number of positions in `state` when `length` tokens have been appended: all, until some are dropped."""
        return length

    def join(self, members: Sequence[KVCache], columns: int) -> None:
        """Takes over the rows of `members`, one below the other, right-aligned in `columns` columns."""
        self.state = [
            mx.concatenate([mx.pad(each, [(0, 0), (0, 0), (columns - each.shape[2], 0), (0, 0)]) for each in arrays])
            for arrays in zip(*(member.state for member in members), strict=True)
        ]

    def keep(self, rows: Sequence[int], start: int) -> None:
        """Keeps these rows, in this order, from column `start` on."""
        index = mx.array(rows)
        self.state = [array[index, :, start:] for array in self.state] if rows else []

    def row(self, number: int, start: int) -> Sequence[mx.array]:
        """The `state` of one row, from column `start` on."""
        return [array[number : number + 1, :, start:] for array in self.state]

    def size(self) -> int:
        """Tokens kept; mlx-lm's name."""
        return self._filled

    def empty(self) -> bool:
        """True if nothing was ever appended; mlx-lm's name."""
        return not self._buffers

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, filled or not."""
        return sum(buffer.nbytes for buffer in self._buffers)

"""What a sequence remembers: its keys and values, its token ids, and the RoPE table they were made under.

`KVCache` is one layer's share and keeps mlx-lm's duck type, so that mlx-lm's own tools work on it. `PromptCache` is the
list of them, which is what `model.make_cache()` returns and what the caller passes to `model(ids, cache)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

from phi4_mlx.errors import RequestError
from phi4_mlx.models.rope import Regime


def group_size(head_dim: int) -> int:
    """How many numbers of a head share a scale and a bias where they are quantised."""
    return 64 if head_dim % 64 == 0 else 32


def buffer_length(num_tokens: int) -> int:
    """The positions of the buffer that so many tokens are put in.

    One is always left: a buffer that they filled would be no copy of them, and hold on to all that they are a part of.
    """
    return (num_tokens // KVCache.STEP + 1) * KVCache.STEP


class KVCache:
    """Keys and values of one layer, [B, K, S, Dh] each, in buffers that grow `STEP` positions at a time.

    Args:
        bits: 4 or 8 keeps them quantised, in groups of 64 or 32 along Dh with a scale and a bias each; None does not.
        max_size: how many tokens may stay. Where more come, the oldest `STEP` are forgotten, but for the first `SINK`,
            which attention leans on (Xiao et al. 2023, "Efficient streaming language models with attention sinks").
            None forgets nothing. A chunk of new tokens always sees all of itself.
    """

    STEP = 256
    SINK = 4

    def __init__(self, bits: int | None = None, max_size: int | None = None) -> None:
        self.bits, self.max_size = bits, max_size
        self._buffers: list[mx.array] = []  # keys, values; where quantised, weights, scales and biases of each
        self._filled = 0
        self._forgotten = 0

    @property
    def offset(self) -> int:
        """Tokens that were put in and not taken back: the position of the next one."""
        return self._filled + self._forgotten

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Appends keys and values [B, K, T, Dh]; returns all of them, [B, K, S, Dh], or triples if quantised."""
        T = keys.shape[2]
        if self.max_size is not None and self._filled + T > self.max_size:
            self._forget(self._filled - (self.max_size - self.STEP))
        start, end = self._filled, self._filled + T
        new = [keys, values] if self.bits is None else [*self._quantised(keys), *self._quantised(values)]
        if not self._buffers or end > self._buffers[0].shape[2]:
            self._buffers = [self._grown(*pair) for pair in zip(self._buffers or [None] * len(new), new, strict=True)]
        self._filled, held = end, []
        for buffer, part in zip(self._buffers, new, strict=True):
            buffer[:, :, start:end] = part
            held.append(buffer[:, :, :end])
        return (held[0], held[1]) if self.bits is None else (tuple(held[:3]), tuple(held[3:]))

    def _quantised(self, array: mx.array) -> Sequence[mx.array]:
        return mx.quantize(array, group_size=group_size(array.shape[-1]), bits=self.bits)

    def _grown(self, buffer: mx.array | None, new: mx.array) -> mx.array:
        B, K, T, width = new.shape
        room = mx.zeros((B, K, buffer_length(T), width), new.dtype)
        return room if buffer is None else mx.concatenate([buffer[:, :, : self._filled], room], axis=2)

    def _forget(self, n: int) -> None:
        if n <= 0:
            return
        first, last = self.SINK + n, self._filled
        self._buffers = [mx.concatenate([b[:, :, : self.SINK], b[:, :, first:last]], axis=2) for b in self._buffers]
        self._filled, self._forgotten = self._filled - n, self._forgotten + n

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> str | mx.array | None:
        """The attention mask of the next N tokens: causal over all that came before. mlx-lm's signature."""
        if window_size is not None:
            raise RequestError(f"attention in a window of {window_size} tokens is not done by this cache")
        if return_array:
            return mx.arange(self._filled, self._filled + N)[:, None] >= mx.arange(self._filled + N)
        return None if N == 1 else "causal"

    @property
    def state(self) -> Sequence[mx.array]:
        """Keys and values as far as they are filled, [B, K, S, Dh] each; empty before the first token."""
        return [buffer[:, :, : self._filled] for buffer in self._buffers]

    @state.setter
    def state(self, state: Sequence[mx.array]) -> None:
        self._buffers = list(state)
        self._filled, self._forgotten = (state[0].shape[2] if len(state) else 0), 0

    @property
    def meta_state(self) -> str:
        """Nothing besides `state`; mlx-lm's name."""
        return ""

    @meta_state.setter
    def meta_state(self, value: str) -> None:
        if value:
            raise ValueError("this cache keeps no meta state")

    def is_trimmable(self) -> bool:
        """Whether `trim` can take back some tokens and leave others: not once the oldest are forgotten."""
        return self._forgotten == 0

    def trim(self, n: int) -> int:
        """Takes back the last n tokens; returns how many it took."""
        if n >= self.offset:
            n, self._filled, self._forgotten = self.offset, 0, 0
        elif n > 0 and self.is_trimmable():
            self._filled -= n
        else:
            n = 0
        return n

    def size(self) -> int:
        """Tokens held; mlx-lm's name."""
        return self._filled

    def empty(self) -> bool:
        """Whether nothing was ever put in; mlx-lm's name."""
        return not self._buffers

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, filled or not."""
        return sum(buffer.nbytes for buffer in self._buffers)


class PromptCache(list):  # list[KVCache]; the bare base keeps mlx-lm's isinstance checks and Python 3.10 content
    """The caches of all layers, which stand at one offset, with the ids of the tokens in them and their RoPE regime.

    The ids are what makes a crossing of the LongRoPE boundary exact: `admit` then empties the cache and hands back the
    whole sequence, to be run again under the other table.
    """

    def __init__(self, layers: Iterable[Any], regime_for: Callable[[int], Regime], regime: Regime | None = None):
        super().__init__(layers)
        self._regime_for = regime_for
        self._pinned = regime
        self._reach = 0  # the length that was announced, while it is being filled
        self._pieces: list[mx.array] = []  # [B, t] each
        self._known = 0  # their length together
        self.regime = regime or regime_for(self.offset)
        self.rerun_tokens = 0  # how many were run again at crossings, so far

    @property
    def offset(self) -> int:
        """Tokens held."""
        return self[0].offset

    @property
    def ids(self) -> mx.array:
        """The ids of the tokens held, [B, S]."""
        self._forget_trimmed()
        if not self._pieces:
            return mx.zeros((1, 0), mx.int32)
        if len(self._pieces) > 1:
            self._pieces = [mx.concatenate(self._pieces, axis=1)]
        return self._pieces[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, filled or not."""
        return sum(layer.nbytes for layer in self)

    @property
    def pinned(self) -> Regime | None:
        """The RoPE table that was asked for whatever the length, if one was."""
        return self._pinned

    @property
    def bounded(self) -> bool:
        """Whether it forgets the oldest tokens when it is full."""
        return any(getattr(layer, "max_size", None) is not None for layer in self)

    def crosses(self, num_tokens: int) -> bool:
        """Whether so many new tokens would ask for another RoPE table."""
        return self._wanted(num_tokens) != self.regime

    def admit(self, ids: mx.array, reach: int | None = None) -> mx.array:
        """Makes ready for new tokens, and for a sequence that is about to reach a length.

        Args:
            ids: the new tokens, [B, T].
            reach: the whole length that a prefill in chunks will come to; it decides the regime of all its chunks,
                until `forget_reach`. None if nothing new is announced.

        Returns:
            The ids to run: the new ones [B, T], or all of the sequence [B, S + T] after a crossing.

        Raises:
            RequestError: a crossing, and the cache was not filled by this model, so that it does not know its ids.
        """
        self._forget_trimmed()
        self._reach = self._reach if reach is None else reach
        wanted = self._wanted(ids.shape[1])
        if self.offset > 0 and wanted != self.regime:
            if self._known < self.offset:
                raise RequestError(
                    f"{self.offset} cached tokens must be run again under the {wanted} RoPE table, and the cache does "
                    "not know their ids; make it with model.make_cache()"
                )
            ids = mx.concatenate([self.ids, ids], axis=1)
            self.rerun_tokens += self.offset
            self._empty()
        self.regime = wanted
        return ids

    def forget_reach(self) -> None:
        """Takes back the length that was announced: it has been reached, or the prefill was interrupted."""
        self._reach = 0

    def remember(self, ids: mx.array) -> mx.array:
        """`admit`, for the model itself: also keeps the ids that it is about to run."""
        ids = self.admit(ids)
        if len(self._pieces) >= KVCache.STEP:
            mx.async_eval(self.ids)  # as one piece
        self._pieces.append(ids)
        self._known += ids.shape[1]
        return ids

    def restore(self, ids: Sequence[int], states: Iterable[Sequence[mx.array]], regime: Regime) -> None:
        """Takes over keys and values that were made elsewhere, in the place of its own.

        Args:
            ids: the tokens that they are of, [S].
            states: keys and values [1, K, S, Dh] of each layer.
            regime: the RoPE table that they were made under.
        """
        for layer, state in zip(self, states, strict=True):
            layer.state = state
        self._pieces, self._known = [mx.array([list(ids)], mx.int32)], len(ids)
        self.regime = regime

    def make_mask(self, N: int) -> str | mx.array | None:
        """The attention mask of the next N tokens, the same for all layers."""
        return self[0].make_mask(N)

    def is_trimmable(self) -> bool:
        """Whether some tokens can be taken back and others stay."""
        return all(layer.is_trimmable() for layer in self)

    def trim(self, n: int) -> int:
        """Takes back the last n tokens; returns how many it took: none where `is_trimmable` says that it cannot."""
        n = max(0, min(self.offset, n))
        taken = [layer.trim(n) for layer in self]
        self._forget_trimmed()
        return taken[0]

    def reuse(self, ids: Sequence[int]) -> list[int]:
        """Keeps what a new prompt shares with the tokens held, and forgets the rest.

        Args:
            ids: the whole new prompt; B must be 1.

        Returns:
            The ids still to prefill: at least the last one, so that there are logits to go on from.
        """
        held = self.ids[0].tolist()
        shared = 0
        for old, new in zip(held, ids[:-1]):  # noqa: B905
            if old != new:
                break
            shared += 1
        if shared < self.offset and not self.is_trimmable():
            shared = 0
        self.trim(self.offset - shared)
        return list(ids[shared:])

    def _wanted(self, num_tokens: int) -> Regime:
        return self._pinned or self._regime_for(max(self._reach, self.offset + num_tokens))

    def _forget_trimmed(self) -> None:
        """Brings the ids in line with the layers, which mlx-lm's tools trim one by one."""
        if self._known > self.offset:
            self._reach = 0
            self._pieces = [mx.concatenate(self._pieces, axis=1)[:, : self.offset]]
            self._known = self.offset
            mx.async_eval(self._pieces)  # else trims pile up on each other

    def _empty(self) -> None:
        self._pieces = []
        self._known = 0
        for layer in self:
            layer.trim(layer.offset)

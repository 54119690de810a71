"""Several sequences of one model side by side, for one forward pass: rows that end at the same column."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from phi4_mlx.models.cache import KVCache, PromptCache
from phi4_mlx.models.rope import Regime
from phi4_mlx.models.text import Model


class Rows(PromptCache):
    """The caches of several sequences as one, a row each: they end at the same column, and begin where they begin."""

    def __init__(self, model: Model, regime: Regime):
        super().__init__([KVCache() for _ in model.layers], model.model.rope.regime, regime)
        self._padding: list[int] = []  # columns before each row begins

    @property
    def columns(self) -> int:
        """Columns in use."""
        return self[0].offset

    @property
    def lengths(self) -> list[int]:
        """Tokens held, by row."""
        return [self.columns - padding for padding in self._padding]

    @property
    def offset(self) -> mx.array:
        """The positions of the next tokens, [B]."""
        return mx.array(self.lengths)

    def remember(self, ids: mx.array) -> mx.array:
        """Nothing to keep: the sequences know their ids."""
        return ids

    def make_mask(self, N: int) -> mx.array | None:
        """Which columns a row's next token may look at, [B, 1, 1, S]: those that are its own."""
        if not any(self._padding):
            return None
        return mx.arange(self.columns + N) >= mx.array(self._padding)[:, None, None, None]

    def join(self, caches: list[PromptCache]) -> None:
        """Appends a row for each cache, its arrays copied."""
        lengths = [*self.lengths, *(cache.offset for cache in caches)]
        S = max(lengths)
        members = ([self] if self._padding else []) + [*caches]
        for number, layer in enumerate(self):
            keys, values = zip(*(member[number].state for member in members), strict=True)
            layer.state = _side_by_side(keys, S), _side_by_side(values, S)
        self._padding = [S - length for length in lengths]

    def copy_row(self, number: int, ids: list[int], cache: PromptCache) -> PromptCache:
        """What a row holds, in a cache of its own.

        Args:
            number: which row.
            ids: those of its tokens, and perhaps more.
            cache: an empty one.
        """
        first = self._padding[number]
        states = [[array[number : number + 1, :, first:] for array in layer.state] for layer in self]
        cache.restore(ids[: self.columns - first], states, self.regime)
        return cache

    def keep(self, numbers: list[int]) -> None:
        """Keeps these rows alone, in this order."""
        self._padding = [self._padding[number] for number in numbers]
        unused = min(self._padding, default=0)
        self._padding = [padding - unused for padding in self._padding]
        index = mx.array(numbers)
        for layer in self:
            layer.state = [array[index, :, unused:] for array in layer.state] if numbers else []


def _side_by_side(arrays: Iterable[mx.array], S: int) -> mx.array:
    """Rows [B, K, s, Dh] of several lengths, filled up before their beginning to [sum of B, K, S, Dh]."""
    return mx.concatenate([mx.pad(array, [(0, 0), (0, 0), (S - array.shape[2], 0), (0, 0)]) for array in arrays])

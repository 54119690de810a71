"""The caches of several sequences side by side, for one forward pass: rows that end at the same column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx

from phi4_mlx.models.cache import LayerCache, Mask
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.rope import Regime
from phi4_mlx.tokens.prompt import places_of


class BatchCache(list[LayerCache]):
    """One row a sequence: rows end at the same column and start where their sequence starts.

    Args:
        layers: an empty `LayerCache` for each layer.
        regime: the RoPE table of all rows.

    Attributes:
        adapters: the adapter of each row; None for the base alone.
    """

    def __init__(self, layers: Iterable[LayerCache], regime: Regime):
        super().__init__(layers)
        self.regime: Regime = regime
        self.adapters: list[str | None] = []
        self._padding: list[int] = []  # columns before each row starts

    @property
    def columns(self) -> int:
        """Columns in use."""
        return self[0].offset

    @property
    def lengths(self) -> list[int]:
        """Tokens cached, by row."""
        return [self.columns - padding for padding in self._padding]

    @property
    def positions(self) -> mx.array:
        """The position of each row's next token, [B]."""
        return mx.array(self.lengths)

    def record(self, ids: mx.array) -> None:
        """Keeps no ids: the sequences have them."""

    def make_mask(self, N: int) -> Mask:
        """The columns that each row's next N tokens may attend to; N is 1 where rows start at different columns."""
        if not any(self._padding):
            return self[0].make_mask(N)
        assert N == 1, f"{N} tokens a row after rows of different lengths"
        return mx.arange(self.columns + N) >= mx.array(self._padding)[:, None, None, None]

    def join(self, caches: Sequence[PromptCache]) -> None:
        """Appends a row for each cache; its arrays are copied."""
        lengths = [*self.lengths, *(cache.offset for cache in caches)]
        columns = max(lengths)
        members = [*([self] if self._padding else []), *caches]
        for number, layer in enumerate(self):
            layer.join([member[number] for member in members], columns)
        self._padding = [columns - length for length in lengths]
        self.adapters += [cache.adapter for cache in caches]

    def copy_row(self, number: int, ids: list[int], cache: PromptCache) -> PromptCache:
        """Copies a row into a cache of its own.

        Args:
            number: the row.
            ids: the ids of its tokens; more may follow. A `Prompt` if there are media.
            cache: an empty one.
        """
        kept = ids[: self.lengths[number]]
        cache.restore(kept, self.row(number), self.regime, None if places_of(kept) else self.adapters[number])
        return cache

    def row(self, number: int) -> list[Sequence[mx.array]]:
        """The `state` of each layer of a row."""
        return [layer.row(number, self._padding[number]) for layer in self]

    def keep(self, rows: list[int]) -> None:
        """Keeps these rows alone, in this order."""
        padding = [self._padding[row] for row in rows]
        unused = min(padding, default=0)
        self._padding = [each - unused for each in padding]
        self.adapters = [self.adapters[row] for row in rows]
        for layer in self:
            layer.keep(rows, unused)

"""The caches of several sequences side by side, for one forward pass: a row a sequence, a column a token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx

from phi4_mlx.models.cache import LayerCache, Mask
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.rope import Regime
from phi4_mlx.tokens.prompt import places_of

SLACK = 32  # columns that no row needs, after which rows are aligned again; or an eighth of all, if that is more


class BatchCache(list[LayerCache]):
    """One row a sequence. Rows end at the same column and start where their sequence starts.

    A pass appends the same number of columns to every row. `take_back` then removes the last tokens of each row, more
    from one than from another: the columns that a row alone does not use are masked, until enough of them have come
    together for the rows to be aligned again, which copies the cache.

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
        self._unused: list[int] = []  # columns of each row that hold no token of it
        self._mask: mx.array | None = None  # the used ones of the first columns, bool [B, n]; None if rows are aligned

    @property
    def columns(self) -> int:
        """Columns in use."""
        return self[0].offset

    @property
    def lengths(self) -> list[int]:
        """Tokens cached, by row."""
        return [self.columns - unused for unused in self._unused]

    @property
    def positions(self) -> mx.array:
        """The position of each row's next token, [B]."""
        return mx.array(self.lengths)

    @property
    def rewindable(self) -> bool:
        """True if `take_back` works, and rows can append several tokens each; speculation needs that."""
        return all(layer.is_trimmable() for layer in self)

    def record(self, ids: mx.array) -> None:
        """Keeps no ids: the sequences have them."""

    def make_mask(self, N: int) -> Mask:
        """The columns that each row's next N tokens may attend to; N is 1 unless `rewindable`."""
        if not any(self._unused):
            return self[0].make_mask(N)
        assert N == 1 or self.rewindable, f"{N} tokens a row after rows of different lengths"
        columns = self.columns + N
        used = self._used(columns)[:, None, None]  # [B, 1, 1, S]
        return used if N == 1 else used & (mx.arange(columns) <= mx.arange(self.columns, columns)[:, None])

    def take_back(self, counts: Sequence[int]) -> None:
        """Takes back the last tokens of each row, as many as `counts` says; at most those of the last pass."""
        common = min(counts)
        if common:
            for layer in self:
                layer.trim(common)
        rest = [count - common for count in counts]
        if any(rest):
            columns = self.columns
            self._mask = self._used(columns) & (mx.arange(columns) < columns - mx.array(rest)[:, None])
            self._unused = [unused + count for unused, count in zip(self._unused, rest, strict=True)]
            if min(self._unused) > max(SLACK, columns // 8):
                self._align()

    def join(self, caches: Sequence[PromptCache]) -> None:
        """Appends a row for each cache; its arrays are copied."""
        self._align()
        lengths = [*self.lengths, *(cache.offset for cache in caches)]
        columns = max(lengths)
        members = [*([self] if self._unused else []), *caches]
        for number, layer in enumerate(self):
            layer.join([member[number] for member in members], columns)
        self._unused = [columns - length for length in lengths]
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
        self._align()
        return [layer.row(number, self._unused[number]) for layer in self]

    def keep(self, rows: list[int]) -> None:
        """Keeps these rows alone, in this order."""
        self._align()
        unused = [self._unused[row] for row in rows]
        start = min(unused, default=0)
        self._unused = [each - start for each in unused]
        self.adapters = [self.adapters[row] for row in rows]
        for layer in self:
            layer.keep(rows, start)

    def _used(self, columns: int) -> mx.array:
        """True for the columns that hold a token of the row or will: bool [B, columns], with those of the next pass."""
        if self._mask is None:
            return mx.arange(columns) >= mx.array(self._unused)[:, None]
        new = mx.ones((len(self._unused), columns - self._mask.shape[1]), mx.bool_)
        return mx.concatenate([self._mask, new], axis=1)

    def _align(self) -> None:
        """Moves the used columns of each row together, to the last column of the longest row."""
        if self._mask is None:
            return
        lengths, columns = self.lengths, self.columns
        longest = max(lengths)
        keys = mx.where(self._used(columns), columns, 0) + mx.arange(columns)
        order = mx.argsort(keys, axis=1)[:, None, columns - longest :, None]  # the unused first, the others as they are
        for layer in self:
            layer.state = [mx.take_along_axis(array, order, axis=2) for array in layer.state]
        self._unused, self._mask = [longest - length for length in lengths], None

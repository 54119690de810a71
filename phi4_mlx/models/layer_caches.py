"""The caches of all layers of one sequence, which grow and shrink together."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from phi4_mlx.models.cache import LayerCache, Mask
from phi4_mlx.models.snapshot import Snapshot, Snapshots


class LayerCaches(list[LayerCache]):  # a list, as mlx-lm's tools expect
    """One `LayerCache` a layer, all at the same offset, and snapshots of them.

    Args:
        layers: the caches.

    Attributes:
        snapshots: those that `truncate` can return to; forks share them.
    """

    def __init__(self, layers: Iterable[LayerCache]):
        super().__init__(layers)
        self.snapshots = Snapshots()

    @property
    def offset(self) -> int:
        """Tokens cached."""
        return self[0].offset

    positions = offset  # of the next token; in a batch, one a row

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, filled or not, and of snapshots."""
        return sum(layer.nbytes for layer in self) + sum(each.nbytes for each in self.snapshots)

    @property
    def rewindable(self) -> bool:
        """True if the tokens of a short pass can be taken back after it; speculation needs that."""
        return all(layer.rewindable for layer in self)

    @property
    def needs_snapshots(self) -> bool:
        """True if tokens are taken back by returning to a snapshot."""
        return not self.is_trimmable() and all(layer.snapshot() is not None for layer in self)

    def make_mask(self, N: int) -> Mask:
        """The attention mask of the next N tokens where all layers have the same one; else each layer makes its own."""
        return self[0].make_mask(N)

    def is_trimmable(self) -> bool:
        """True if some tokens can be taken back while others stay."""
        return all(layer.is_trimmable() for layer in self)

    def trim(self, n: int) -> int:
        """Takes back the last n tokens; returns how many it took: n, all of them, or 0 where that is not possible."""
        n = max(0, min(self.offset, n))
        if n < self.offset and not all(layer.can_trim(n) for layer in self):
            return 0
        taken = [layer.trim(n) for layer in self]
        self._follow_layers()
        return taken[0]

    def mark(self) -> None:
        """Takes a snapshot to return to, where `needs_snapshots`."""
        if self.offset and self.needs_snapshots:
            self.snapshots.add([self.snapshot()])

    def snapshot(self) -> Snapshot:
        """A snapshot of this moment."""
        return Snapshot(self.offset, [layer.snapshot() for layer in self])

    def reusable(self, length: int) -> int:
        """The number of the first `length` tokens that can be kept without the rest.

        All of them where tokens can be taken back; else those up to the latest snapshot.
        """
        if length >= self.offset or self.is_trimmable():
            return min(length, self.offset)
        return self.snapshots.latest(length)

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens, which must be `reusable`."""
        if length == self.offset:
            return
        if length == 0 or self.is_trimmable():
            self.trim(self.offset - length)
        else:
            self.return_to(self.snapshots.at(length))

    def return_to(self, snapshot: Snapshot) -> None:
        """Goes back to the moment of a snapshot."""
        for layer, own in zip(self, snapshot.layers, strict=True):
            layer.restore(own)
        self._follow_layers()

    def compact(self) -> None:
        """Copies the filled part out of larger buffers, which are then free."""
        for layer in self:
            layer.compact()
        mx.eval([layer.state for layer in self])

    def _follow_layers(self) -> None:
        """Drops what is kept beside the layers of tokens past their length; mlx-lm's tools trim layers one by one."""
        self.snapshots.drop_after(self.offset)

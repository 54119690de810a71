"""The rows of a batch that share a forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from phi4_mlx.generation.memory import cache_bytes
from phi4_mlx.generation.sequence import BatchSequence
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.safe import safe


@dataclass(eq=False)
class RowGroup:
    """Rows of one model and one RoPE table.

    Attributes:
        model: the model of all rows.
        cache: their keys and values.
        members: the sequence of each row; None where it has left.
        arrivals: sequences that become rows at the next step, with their caches.
    """

    model: LanguageModel
    cache: BatchCache
    members: list[BatchSequence | None] = field(default_factory=list)
    arrivals: list[tuple[BatchSequence, PromptCache]] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """Columns of the cache with the arrivals in it."""
        return max([self.cache.columns, *(cache.offset for _, cache in self.arrivals)])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, the arrivals included."""
        cost, columns = self.model.context_cost(), self.columns
        rows = len(self.members) * cache_bytes(cost, columns, snapshots=0)
        return rows + len(self.arrivals) * cache_bytes(cost, columns)

    def padding_with(self, sequence: BatchSequence, cache: PromptCache) -> float:
        """Columns that the sequence would add beyond its own tokens; infinite if it cannot be a row here."""
        if sequence.model is not self.model or cache.regime != self.cache.regime:
            return math.inf
        if safe("rows") and (self.arrivals or any(self.members)):
            return math.inf
        longer = cache.offset - self.columns
        return longer * (len(self.members) + len(self.arrivals)) if longer > 0 else -longer

    def settle(self) -> list[BatchSequence]:
        """Drops the rows of sequences that have left and appends the arrivals; returns the members."""
        kept = [number for number, member in enumerate(self.members) if member is not None]
        if len(kept) < len(self.members):
            self.cache.keep(kept)
        members = [member for member in self.members if member is not None]
        if self.arrivals:
            self.cache.join([cache for _, cache in self.arrivals])
            for sequence, _ in self.arrivals:
                sequence.cache = None
                members.append(sequence)
        self.members, self.arrivals = [*members], []
        return members

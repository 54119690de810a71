"""The rows of a batch that share a forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import mlx.core as mx

from phi4_mlx.generation.draws import wanted
from phi4_mlx.generation.memory import cache_bytes
from phi4_mlx.generation.sequence import BatchSequence
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.safe import safe
from phi4_mlx.models.split_logits import Logits
from phi4_mlx.tokens.prefix import shared_length


@dataclass(eq=False)
class RowGroup:
    """Rows of one model, one RoPE table and one kind of cache.

    Attributes:
        model: the model of all rows.
        kv_bits: of their keys and values; None if they are not quantised.
        cache: their keys and values.
        members: the sequence of each row; None where it has left.
        arrivals: sequences that become rows at the next step, with their caches.
    """

    model: LanguageModel
    kv_bits: int | None
    cache: BatchCache
    members: list[BatchSequence | None] = field(default_factory=list)
    arrivals: list[tuple[BatchSequence, PromptCache]] = field(default_factory=list)

    @property
    def sequences(self) -> list[BatchSequence]:
        """Those that have a row, or will have one."""
        return [*(member for member in self.members if member is not None), *(arrival for arrival, _ in self.arrivals)]

    @property
    def columns(self) -> int:
        """Columns of the cache with the arrivals in it."""
        return max([self.cache.columns, *(cache.offset for _, cache in self.arrivals)])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, the arrivals included."""
        cost, columns = self.model.context_cost(self.kv_bits), self.columns
        sequences, arriving = self.sequences, len(self.arrivals)
        rows = (len(sequences) - arriving) * cache_bytes(cost, columns, snapshots=0)
        rows += arriving * cache_bytes(cost, columns)
        return rows + sum(sequence.proposer_bytes for sequence in sequences)

    def padding_with(self, sequence: BatchSequence, cache: PromptCache) -> float:
        """Columns that the sequence would add beyond its own tokens; infinite if it cannot be a row here."""
        kinds = (sequence.kv_bits, cache.regime), (self.kv_bits, self.cache.regime)
        if sequence.model is not self.model or kinds[0] != kinds[1]:
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

    def run(self, chunks: list[list[int]]) -> RowPass:
        """Runs ids of each row, one or more; shorter rows are filled up with ids that nothing attends to."""
        width, lengths = max(map(len, chunks)), self.cache.lengths
        ids = mx.array([[*chunk, *[0] * (width - len(chunk))] for chunk in chunks], mx.int32)
        known = [len(member.ids) - length for member, length in zip(self.members, lengths, strict=True) if member]
        samplers = [None if member is None else member.sampler for member in self.members for _ in range(width)]
        logits = self.model.candidates(self.model.hidden(ids, self.cache), *wanted(samplers))
        return RowPass(self, lengths, chunks, known, width, logits)


@dataclass(eq=False)
class RowPass:
    """A forward pass over the rows of a group, of which tokens are drawn and guesses kept.

    Attributes:
        group: the rows.
        starts: tokens cached before, by row.
        chunks: the ids that each row has run.
        known: the number of ids that each row lacked before; those of `chunks` past them are guesses.
        width: T, the ids of each row with those that fill it up.
        logits: after each of them, [B * T, V].
        guessed: guesses in it.
        held: guesses that were drawn; known once it is finished.
    """

    group: RowGroup
    starts: list[int]
    chunks: list[list[int]]
    known: list[int]
    width: int
    logits: Logits
    guessed: int = 0
    held: int = 0

    def due(self) -> list[tuple[int, int]]:
        """(row, column) of the logits that the next token of a row is drawn from; rows that have none are left out."""
        found = []
        for row, (member, start, chunk) in enumerate(zip(self.group.members, self.starts, self.chunks, strict=True)):
            if member is not None and member.drawn < member.max_tokens:
                last = len(member.ids) - start - 1
                if last < len(chunk) and member.ids[start:] == chunk[: last + 1]:
                    found.append((row, last))
        return found

    def finish(self) -> None:
        """Takes back the columns that rows did not fill, and guesses that did not hold."""
        if self.width == 1:
            return
        kept = []
        for member, start, chunk, certain in zip(self.group.members, self.starts, self.chunks, self.known, strict=True):
            same = 0 if member is None else shared_length(member.ids[start:], chunk)
            kept.append(same)
            self.guessed += max(0, len(chunk) - certain)
            self.held += max(0, same - certain)
        most = max(kept) or self.width
        self.group.cache.take_back([self.width - (each or most) for each in kept])  # 0: the row has left

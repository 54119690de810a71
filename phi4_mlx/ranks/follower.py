"""A follower: repeats the leader's operations on its share of the model and its own twins of the caches.

It decides nothing. Before it computes anything with the other ranks, it compares the number of the operation and the
digest of the ids cached so far with its own: collectives that do not match would add up wrong numbers in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import mlx.core as mx

from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.cached_tokens import Conditions
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.shared_stream import shared_stream
from phi4_mlx.models.snapshot import Snapshot
from phi4_mlx.models.split_logits import array_of
from phi4_mlx.ranks.digest import RunningDigest, columns

CLEAR_EVERY = 256  # operations; frees the buffers of outgrown caches


class OutOfStep(Exception):
    """An operation is not the one that follows here."""


class Hears(Protocol):
    """A follower's end of the side channel; `phi4_mlx.ranks.join.Ranks` in a job."""

    def hear(self) -> Mapping[str, Any]:
        """The leader's next command."""

    def done(self, counter: int) -> None:
        """Reports that an operation is computed."""

    def end(self, line: str) -> NoReturn:
        """Ends the job on every rank."""


@dataclass(eq=False)
class HeldCache:
    """The twin of one of the leader's prompt caches."""

    cache: PromptCache
    digest: RunningDigest

    @property
    def digests(self) -> list[RunningDigest]:
        """The digest of its ids."""
        return [self.digest]

    def follow(self, ids: list[list[int]]) -> None:
        """Notes ids [B, T] that the model has run."""
        self.digest.append(columns(ids))

    def run_under(self, regime: Any, adapters: list[str | None]) -> None:
        """Takes over RoPE table and adapter."""
        self.cache.conditions = Conditions(regime, adapters[0])


@dataclass(eq=False)
class HeldBatch:
    """The twin of one of the leader's batch caches."""

    cache: BatchCache
    digests: list[RunningDigest]

    def follow(self, ids: list[list[int]]) -> None:
        """Notes ids [B, T] that the model has run."""
        for digest, row in zip(self.digests, ids, strict=True):
            digest.append(row)

    def run_under(self, regime: Any, adapters: list[str | None]) -> None:
        """Takes over RoPE table and adapters."""
        self.cache.regime, self.cache.adapters = regime, adapters


class Follower:
    """Repeats the operations of one model.

    Args:
        model: this rank's share.
        group: the ranks; None for the default one.

    Attributes:
        model: as given.
        counter: operations that ran the model so far.
        held: number -> the twin of a cache or snapshot that the leader has.
    """

    def __init__(self, model: LanguageModel, group: mx.distributed.Group | None = None) -> None:
        self.counter = 0
        self.held: dict[int, Any] = {}
        self.model, self._group = model, group
        self._hidden: mx.array | None = None  # of the last operation

    def obey(self, command: Mapping[str, Any]) -> None:
        """Repeats an operation and computes its results.

        Args:
            command: from `Leader`.

        Raises:
            OutOfStep: the operation is not the one that follows here; nothing has been computed.
        """
        if command["number"] != self.counter + 1:
            raise OutOfStep(f"operation {command['number']} came after operation {self.counter}")
        with shared_stream():
            for name, *values in command["changes"]:
                getattr(self, f"_{name}")(*values)
            if "ids" in command:
                self._run(command)
            else:
                self._read(command["read"], command["shape"])
        self.counter += 1
        if self.counter % CLEAR_EVERY == 0:
            mx.clear_cache()

    def _run(self, command: Mapping[str, Any]) -> None:
        held, ids = self.held.get(command["cache"]), command["ids"]
        if held is None and command["cache"] is not None:
            raise OutOfStep(f"operation {command['number']} goes on from cache {command['cache']}, which is not here")
        if held is not None:
            own = [[len(digest), digest.value] for digest in held.digests]
            if own != command["digest"]:
                theirs, ours = next(pair for pair in zip(command["digest"], own, strict=True) if pair[0] != pair[1])
                raise OutOfStep(
                    f"operation {command['number']} goes on from {theirs[0]} tokens with digest {theirs[1]:x}, and the "
                    f"cache here has {ours[0]} with digest {ours[1]:x}"
                )
            held.run_under(*command["under"])
            held.follow(ids)
        cache = None if held is None else held.cache
        self._hidden = self.model.hidden(mx.array(ids, mx.int32), cache, rows=command["rows"])
        mx.eval(self._hidden)
        if command["read"]:
            self._read(command["read"], None)
        if len(ids[0]) > 1:  # as `finish_chunk` does: what is cached, without the rest of its graph
            mx.eval([] if cache is None else [layer.state for layer in cache])
            mx.clear_cache()

    def _read(self, read: list[Any], shape: list[int] | None) -> None:
        """Computes this rank's part of `logits` or `candidates`; of other hidden states if there is a shape."""
        hidden = self._hidden
        if shape is not None:
            hidden = mx.distributed.all_sum(mx.zeros(shape, self.model.dtype), group=self._group)
        assert hidden is not None
        name, *arguments = read
        mx.eval(array_of(getattr(self.model, name)(hidden, *arguments)))

    def _cache(self, number: int, kv_bits: int | None, max_kv_size: int | None) -> None:
        self.held[number] = HeldCache(self.model.make_cache(None, kv_bits, max_kv_size), RunningDigest())

    def _batch(self, number: int, regime: Any, kv_bits: int | None) -> None:
        self.held[number] = HeldBatch(self.model.make_batch_cache(regime, kv_bits), [])

    def _drop(self, number: int) -> None:
        self.held.pop(number, None)

    def _trim(self, number: int, n: int) -> None:
        held: HeldCache = self.held[number]
        held.cache.trim(n)
        held.digest.cut(held.cache.offset)

    def _snapshot(self, number: int, snapshot: int) -> None:
        self.held[snapshot] = self.held[number].cache.snapshot()

    def _return(self, number: int, snapshot: int) -> None:
        held: HeldCache = self.held[number]
        found: Snapshot = self.held[snapshot]
        held.cache.return_to(found)
        held.digest.cut(held.cache.offset)

    def _compact(self, number: int) -> None:
        self.held[number].cache.compact()

    def _branch(self, number: int, twin: int, length: int) -> None:
        held: HeldCache = self.held[number]
        self.held[twin] = HeldCache(held.cache.branch(length), held.digest.copy(length))

    def _join(self, number: int, caches: list[int]) -> None:
        batch, members = self.held[number], [self.held[each] for each in caches]
        batch.cache.join([member.cache for member in members])
        batch.digests += [member.digest.copy() for member in members]

    def _row(self, number: int, row: int, twin: int) -> None:
        batch, held = self.held[number], self.held[twin]
        for layer, state in zip(held.cache, batch.cache.row(row), strict=True):
            layer.state = state
        held.digest = batch.digests[row].copy()

    def _take_back(self, number: int, counts: list[int]) -> None:
        batch = self.held[number]
        batch.cache.take_back(counts)
        for digest, count in zip(batch.digests, counts, strict=True):
            digest.cut(len(digest) - count)

    def _keep(self, number: int, rows: list[int]) -> None:
        batch = self.held[number]
        batch.cache.keep(rows)
        batch.digests = [batch.digests[row] for row in rows]

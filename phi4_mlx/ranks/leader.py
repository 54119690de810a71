"""The leader: a model and caches whose operations are told to the followers, which repeat them on their shares.

Only operations that run the model are told at once. Changes of caches wait for the next of those and go with it, so a
decode step is one message.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, NoReturn, Protocol

import mlx.core as mx

from phi4_mlx.errors import Phi4Error, RequestError, message_of
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.model import ContextCost, LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.rope import Regime
from phi4_mlx.models.snapshot import Snapshot
from phi4_mlx.models.split_logits import LEAST, SplitLogits, array_of
from phi4_mlx.ranks.digest import RunningDigest, columns

Read = list[Any]
"""What is read of hidden states: the name of a model's method, and its further arguments."""


class Tells(Protocol):
    """The leader's end of the side channel; `phi4_mlx.ranks.join.Ranks` in a job."""

    def tell(
        self, command: Mapping[str, Any], counter: int | None = None, tokens: int = 1, *, new: bool = False
    ) -> None:
        """Sends a command to all followers, and expects that they have done it in due time."""

    def end(self, line: str) -> NoReturn:
        """Ends the job on every rank."""


class Leader:
    """Tells the followers the operations of one model.

    Args:
        ranks: the side channel.
        splits_head: followers have a part of the head, as in tensor parallel.

    Attributes:
        counter: operations that ran the model so far.
        burden: how many times as large a part of its memory a context takes on the fullest rank as on this one, or 1.
    """

    def __init__(self, ranks: Tells, *, splits_head: bool) -> None:
        self.counter, self.burden = 0, 1.0
        self._ranks, self._splits_head = ranks, splits_head
        self._changes: deque[list[Any]] = deque()  # of caches, since the last operation
        self._numbers = itertools.count(1)
        self._snapshots: weakref.WeakKeyDictionary[Snapshot, int] = weakref.WeakKeyDictionary()
        self._hidden: mx.array | None = None  # of the last pass
        self._cache: weakref.ref[LedPromptCache | LedBatchCache] | None = None  # of that pass
        self._read: Read | None = None  # what was last read of its hidden states,
        self._found: mx.array | SplitLogits | None = None  # and the result
        self._known: Counter[str] = Counter()  # kinds of operations

    def note(self, name: str, *values: Any) -> None:
        """Queues a change of a cache; see `Follower`."""
        self._changes.append([name, *values])

    def number(self, held: object) -> int:
        """A number for an object that followers keep a twin of, until it is freed here."""
        number = next(self._numbers)
        weakref.finalize(held, self.note, "drop", number).atexit = False
        return number

    def take(self, snapshot: Snapshot) -> int:
        """Numbers a snapshot."""
        number = self._snapshots[snapshot] = self.number(snapshot)
        return number

    def number_of(self, snapshot: Snapshot) -> int:
        """The number of a snapshot."""
        return self._snapshots[snapshot]

    def hidden(
        self,
        model: LedModel,
        run: Callable[[], mx.array],
        ids: mx.array,
        cache: LedPromptCache | LedBatchCache | None,
        rows: int | None,
    ) -> mx.array:
        """Runs the model on all ranks.

        Args:
            model: the model.
            run: the leader's share of the pass.
            ids: [B, T].
            cache: appended to; None for none.
            rows: see `LanguageModel.hidden`.

        Returns:
            The hidden states, whose computation is queued.
        """
        numbers: list[list[int]] = ids.tolist()
        # A decode step is read as the one before it: so it is one message.
        read = cache.read if cache is not None and ids.shape[1] == 1 and _fits(cache.read, len(numbers)) else None
        command = {
            "cache": None if cache is None else cache.number,
            "under": None if cache is None else [cache.regime, cache.adapters],
            "ids": numbers,
            "rows": rows,
            "digest": _digests(cache, numbers),
            "read": read,
        }
        if model.adapters is not None and cache is not None:
            model.adapters.select(cache.adapters)  # refused before it is told
        # Media may be refused while a pass is built. Sums may be computed meanwhile, for which all ranks must run.
        first = self._splits_head or ids.shape[1] == 1
        if first:
            self._tell(command, ids.size)
        try:
            hidden = run()
        except BaseException as error:
            if isinstance(error, Phi4Error) and not first:
                raise
            why = f"{type(error).__name__}: {message_of(error)}".removesuffix(": ")
            self._ranks.end(f"rank 0 failed in operation {self.counter + (not first)}: {why}")
        if not first:
            self._tell(command, ids.size)
        if cache is not None:
            cache.follow(numbers)
        mx.async_eval(hidden)
        self._hidden, self._cache = hidden, None if cache is None else weakref.ref(cache)
        self._read, self._found = read, None if read is None else model.own(read, hidden)
        return hidden

    def read(self, model: LedModel, read: Read, hidden: mx.array) -> mx.array | SplitLogits:
        """The logits of hidden states [..., D] on all ranks, or the likeliest of them.

        Args:
            model: the model.
            read: the method of the model, "logits" or "candidates", and its further arguments.
            hidden: usually those of the last pass, which every rank has; others are handed to them first.
        """
        if not self._splits_head:
            return model.own(read, hidden)
        known = hidden is self._hidden
        if known and self._found is not None and read == self._read:
            return self._found
        self._tell({"read": read, "shape": None if known else [*hidden.shape]})
        found = model.own(read, hidden if known else model.spread(hidden))
        if known:
            self._read, self._found = read, found
            if self._cache is not None and (cache := self._cache()) is not None:
                cache.read = read
        return found

    def settle(self) -> None:
        """Waits until the last operation is computed."""
        if self._hidden is not None:
            mx.eval(self._hidden)
        if self._found is not None:
            mx.eval(array_of(self._found))

    def _tell(self, command: Mapping[str, Any], tokens: int = 1) -> None:
        """Tells an operation over so many tokens, with the changes of caches before it."""
        changes = []
        while self._changes:
            changes.append(self._changes.popleft())
        self.counter += 1
        told = {"number": self.counter, "changes": changes, **command}
        self._ranks.tell(told, self.counter, tokens, new=self._is_new(command))

    def _is_new(self, command: Mapping[str, Any]) -> bool:
        """True for the first operations of a kind: kernels are compiled, for steps at the second."""
        ids, (regime, adapters) = command.get("ids"), command.get("under") or ("", [])
        shape = ids and (len(ids), len(ids[0]) == 1)
        kind = str((command["read"] and command["read"][0], regime, sorted({*map(str, adapters)}), shape))
        self._known[kind] += 1
        return self._known[kind] <= 2


def _fits(read: Read | None, rows: int) -> bool:
    """True if what was read of other rows can be read of so many: the temperatures are one for all, or one a row."""
    return read is None or read[0] != "candidates" or len(read[2]) in (0, 1, rows)


def _digests(cache: LedPromptCache | LedBatchCache | None, ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """(length, digest) before new ids, of each sequence."""
    if cache is None:
        return []
    return [[len(digest), digest.value] for digest in cache.digests]


class LedModel(LanguageModel):
    """The leader's part of a model; `lead` puts it before the model's own class."""

    leader: Leader
    spread: Callable[[mx.array], mx.array]

    def hidden(
        self,
        ids: mx.array,
        cache: PromptCache | BatchCache | None = None,
        *,
        embeddings: mx.array | None = None,
        segments: mx.array | None = None,
        rows: int | None = None,
    ) -> mx.array:
        """See `LanguageModel.hidden`."""
        if embeddings is not None or segments is not None:
            raise RequestError("a model over ranks reads ids alone, neither embeddings nor packed samples")
        if not isinstance(cache, LedPromptCache | LedBatchCache | None):
            raise RequestError("a model over ranks needs a cache of its own; make it with model.make_cache()")
        inherited = super().hidden  # type: ignore[safe-super]

        def run() -> mx.array:
            return inherited(ids, cache, rows=rows)

        return self.leader.hidden(self, run, ids, cache, rows)

    def logits(self, hidden: mx.array) -> mx.array:
        """See `LanguageModel.logits`."""
        found = self.leader.read(self, ["logits"], hidden)
        assert isinstance(found, mx.array)
        return found

    def candidates(self, hidden: mx.array, count: int = LEAST, temps: Sequence[float] = ()) -> mx.array | SplitLogits:
        """See `LanguageModel.candidates`."""
        return self.leader.read(self, ["candidates", count, [*temps]], hidden)

    def own(self, read: Read, hidden: mx.array) -> mx.array | SplitLogits:
        """The result of `logits` or `candidates` by the model itself, queued; other ranks may have a part of it."""
        name, *arguments = read
        found: mx.array | SplitLogits = getattr(super(), name)(hidden, *arguments)
        mx.async_eval(array_of(found))
        return found

    def make_cache(
        self, regime: Regime | None = None, kv_bits: int | None = None, max_kv_size: int | None = None
    ) -> PromptCache:
        """See `LanguageModel.make_cache`."""
        cache = super().make_cache(regime, kv_bits, max_kv_size)
        led = LedPromptCache.of(cache, self.leader, RunningDigest())
        self.leader.note("cache", led.number, kv_bits, max_kv_size)
        return led

    def make_batch_cache(self, regime: Regime, kv_bits: int | None = None) -> BatchCache:
        """See `LanguageModel.make_batch_cache`."""
        led = LedBatchCache(super().make_batch_cache(regime, kv_bits), regime)
        led.leader, led.number, led.digests = self.leader, self.leader.number(led), []
        self.leader.note("batch", led.number, regime, kv_bits)
        return led

    def context_cost(self, kv_bits: int | None = None) -> ContextCost:
        """See `LanguageModel.context_cost`; in bytes of the leader's memory, but so that every rank has room."""
        cost, burden = super().context_cost(kv_bits), self.leader.burden  # type: ignore[safe-super]
        bytes_of = {name: ceil(burden * getattr(cost, name)) for name in ("token_bytes", "layer_bytes", "fixed_bytes")}
        return replace(cost, **bytes_of)


def lead(model: LanguageModel, leader: Leader, spread: Callable[[mx.array], mx.array]) -> LedModel:
    """Makes a share the leader's: its operations are told.

    Args:
        model: rank 0's share; changed.
        leader: tells them.
        spread: hands hidden states to the other ranks, by a sum with their zeros.
    """
    kind = type(model)
    model.__class__ = type(f"Led{kind.__name__}", (LedModel, kind), {})
    assert isinstance(model, LedModel)
    model.leader, model.spread = leader, spread
    return model


class LedPromptCache(PromptCache):
    """A prompt cache that has a twin on every follower."""

    leader: Leader
    number: int
    digest: RunningDigest
    read: Read | None = None  # of the latest hidden states

    @classmethod
    def of(cls, cache: PromptCache, leader: Leader, digest: RunningDigest) -> LedPromptCache:
        """The same cache, whose changes are told from now on."""
        cache.__class__ = cls
        assert isinstance(cache, LedPromptCache)
        cache.leader, cache.number, cache.digest = leader, leader.number(cache), digest
        return cache

    @property
    def digests(self) -> list[RunningDigest]:
        """The digest of its ids."""
        assert len(self.digest) == self.offset, f"{self.offset} cached tokens, of which {len(self.digest)} were told"
        return [self.digest]

    def follow(self, ids: Sequence[Sequence[int]]) -> None:
        """Notes ids [B, T] that the model has run."""
        self.digest.append(columns(ids))

    def trim(self, n: int) -> int:
        """See `LayerCaches.trim`."""
        self.leader.note("trim", self.number, n)
        taken = super().trim(n)
        self.digest.cut(self.offset)
        return taken

    def snapshot(self) -> Snapshot:
        """See `LayerCaches.snapshot`."""
        taken = super().snapshot()
        self.leader.note("snapshot", self.number, self.leader.take(taken))
        return taken

    def return_to(self, snapshot: Snapshot) -> None:
        """See `LayerCaches.return_to`."""
        self.leader.note("return", self.number, self.leader.number_of(snapshot))
        super().return_to(snapshot)
        self.digest.cut(self.offset)

    def compact(self) -> None:
        """See `LayerCaches.compact`."""
        self.leader.note("compact", self.number)
        super().compact()

    def branch(self, length: int) -> PromptCache:
        """See `PromptCache.branch`."""
        twin = LedPromptCache.of(super().branch(length), self.leader, self.digest.copy(length))
        self.leader.note("branch", self.number, twin.number, length)
        return twin

    def restore(
        self, ids: Sequence[int], states: Iterable[Sequence[mx.array]], regime: Regime, adapter: str | None = None
    ) -> None:
        """See `PromptCache.restore`. Only the row of a batch can be restored: the other ranks have it too.

        Raises:
            RequestError: the states come from elsewhere.
        """
        if len(self.digest) != len(ids):
            raise RequestError("a cache over ranks cannot take states from elsewhere, of which rank 0 has all")
        super().restore(ids, states, regime, adapter)


class LedBatchCache(BatchCache):
    """A batch cache that has a twin on every follower."""

    leader: Leader
    number: int
    digests: list[RunningDigest]
    read: Read | None = None  # of the latest hidden states

    def follow(self, ids: Sequence[Sequence[int]]) -> None:
        """Notes ids [B, T] that the model has run."""
        for digest, row in zip(self.digests, ids, strict=True):
            digest.append(row)

    def join(self, caches: Sequence[PromptCache]) -> None:
        """See `BatchCache.join`."""
        led = [cache for cache in caches if isinstance(cache, LedPromptCache)]
        self.leader.note("join", self.number, [cache.number for cache in led])
        super().join(led)
        self.digests += [cache.digest.copy() for cache in led]

    def copy_row(self, number: int, ids: list[int], cache: PromptCache) -> PromptCache:
        """See `BatchCache.copy_row`."""
        assert isinstance(cache, LedPromptCache)
        self.leader.note("row", self.number, number, cache.number)
        cache.digest = self.digests[number].copy()
        return super().copy_row(number, ids, cache)

    def take_back(self, counts: Sequence[int]) -> None:
        """See `BatchCache.take_back`."""
        self.leader.note("take_back", self.number, [*counts])
        super().take_back(counts)
        for digest, count in zip(self.digests, counts, strict=True):
            digest.cut(len(digest) - count)

    def keep(self, rows: list[int]) -> None:
        """See `BatchCache.keep`."""
        self.leader.note("keep", self.number, rows)
        super().keep(rows)
        self.digests = [self.digests[row] for row in rows]

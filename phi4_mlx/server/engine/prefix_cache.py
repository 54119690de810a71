"""The prefix cache: caches of earlier prompts, reused by prompts with the same prefix, adapter and RoPE table.

Prefixes are compared by keys, which tell two media apart where ids do not.

An entry with snapshots also serves a prompt that diverges from it, up to the last snapshot before they differ. So a
conversation has one entry: the newest, with the snapshots of those that it extends.

With a store, entries are written to it soon, and what leaves memory stays there. The share of the memory that entries
may take follows what the machine has left.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from phi4_mlx.generation.cache_store.entries import MAX_LOSS, shared_keys
from phi4_mlx.generation.cache_store.store import CacheStore
from phi4_mlx.generation.memory_pressure import Reading, share_of
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache, prefix_of
from phi4_mlx.tokens.prompt import keys_of, places_of

Keys = NDArray[np.int64]  # [S]


@dataclass(frozen=True, eq=False)
class _Entry:
    model: LanguageModel
    adapter: str | None
    keys: Keys
    cache: PromptCache

    @cached_property
    def nbytes(self) -> int:  # without snapshots; first read after compact(): an entry does not change after that
        return self.keys.nbytes + sum(layer.nbytes for layer in self.cache)

    def reusable(self, keys: Keys) -> int:
        """Tokens of a prompt that the entry can serve."""
        return self.cache.reusable(shared_keys(self.keys, keys))

    def extends(self, other: _Entry) -> bool:
        """True if the tokens of this entry begin with those of `other`, under the same adapter and RoPE table."""
        own, others = (self.adapter, self.cache.options), (other.adapter, other.cache.options)
        same = own == others and self.cache.conditions.hold_for(other.cache.conditions)
        return same and shared_keys(self.keys, other.keys) == len(other.keys)

    def lacks(self, other: _Entry) -> int:
        """Tokens of `other` that must be prefilled again if this entry replaces it."""
        return len(other.keys) - self.reusable(other.keys) if self.extends(other) else len(other.keys)


class PrefixCache:
    """Entries up to a limit in bytes; the least recently used goes first.

    Args:
        most_bytes: the most bytes of all entries together.
        store: keeps entries for later; None for none.

    Attributes:
        limit_bytes: the bytes that entries may have now: `most_bytes`, or less where the machine has too little left.
        nbytes: bytes of all entries.
        store: as given.
        failures: caches that could not be kept, stored or read; each costs a prefill.
    """

    MIN_SHARED = 8  # tokens; a shorter prefix is as fast to compute
    MAX_ENTRIES = 1024  # each is compared with a prompt, in some microseconds

    def __init__(self, most_bytes: int, store: CacheStore | None = None):
        self.limit_bytes, self.nbytes, self.store = most_bytes, 0, store
        self._most_bytes, self.failures = most_bytes, 0
        self._entries: list[_Entry] = []  # the most recently used last

    def __len__(self) -> int:
        return len(self._entries)

    def reusable(
        self, model: LanguageModel, adapter: str | None, ids: Sequence[int], kv_bits: int | None = None
    ) -> int:
        """Tokens of a prompt that `find` would find; 0 for none."""
        return self._best(model, adapter, ids, kv_bits)[0]

    def find(
        self, model: LanguageModel, adapter: str | None, ids: Sequence[int], kv_bits: int | None = None
    ) -> PromptCache | None:
        """A cache of the longest known prefix of a prompt, at most all of it except one token.

        Args:
            model: the model that will use the cache.
            adapter: the user's adapter on it; entries of others are not used.
            ids: the whole prompt, a `Prompt` if there are media; its length decides the RoPE table.
            kv_bits: of its keys and values; entries of another kind are not used.
        """
        length, best = self._best(model, adapter, ids, kv_bits)
        if best is None:
            return None
        self._entries.remove(best)
        self._entries.append(best)
        return prefix_of(best.cache, ids, length)  # the entry knows only the identity of its media

    def _best(
        self, model: LanguageModel, adapter: str | None, ids: Sequence[int], kv_bits: int | None
    ) -> tuple[int, _Entry | None]:
        """The entry that serves the most tokens of a prompt, and their number."""
        places, regime = places_of(ids), model.regime(len(ids))
        wanted = np.array(keys_of(ids, places)[:-1], np.int64)
        same = [each for each in self._entries if (each.adapter, each.cache.options.kv_bits) == (adapter, kv_bits)]
        fitting = [each for each in same if each.cache.serves(places, regime)]
        found = [(each.reusable(wanted), each) for each in fitting]
        length, best = max(found, key=lambda pair: pair[0], default=(0, None))
        return (0, None) if length < self.MIN_SHARED else (length, best)

    def put(self, model: LanguageModel, adapter: str | None, cache: PromptCache) -> None:
        """Stores a copy of a cache, in place of the entries that it extends at a loss of at most `MAX_LOSS`."""
        keys = np.array(cache.keys, np.int64)
        needed = keys.nbytes + sum(array.nbytes for layer in cache for array in layer.state)
        large = needed > self.limit_bytes
        if len(keys) < self.MIN_SHARED or (large and self.store is None):
            return
        entry = _Entry(model, adapter, keys, cache.fork(cache.offset))
        entry.cache.forget_media()
        if any(each.lacks(entry) <= 1 for each in self._entries):
            return
        entry.cache.compact()  # else slices of a batch would keep all of its rows alive
        for each in self._entries:
            if entry.extends(each):
                entry.cache.snapshots.add(each.cache.snapshots)
        self._offer(entry, leaving=large)
        if large:
            return
        while _nbytes([entry]) > self.limit_bytes and entry.cache.snapshots:
            entry.cache.snapshots.thin(len(entry.cache.snapshots) - 1)
        self._entries = [each for each in self._entries if entry.lacks(each) > MAX_LOSS * len(each.keys)]
        self._entries.append(entry)
        self._evict()

    def follow(self, reading: Reading | None) -> None:
        """Adapts the share of the memory to what the machine has left.

        Args:
            reading: of this moment; None where the system gives none.
        """
        self.limit_bytes = share_of(reading, self.nbytes, self.limit_bytes, self._most_bytes)
        self._evict()
        if self.limit_bytes < self._most_bytes:
            mx.clear_cache()  # else MLX would keep what has become free

    def close(self, timeout_s: float) -> None:
        """Has the store write entries until the time is over, the most recently used first, and closes it."""
        if self.store is None:
            return
        end_s = time.monotonic() + timeout_s
        for entry in reversed(self._entries):
            self._offer(entry, leaving=True)
            if not self.store.flush(max(0.0, end_s - time.monotonic())):
                break
        self.store.close(max(0.0, end_s - time.monotonic()))

    def _offer(self, entry: _Entry, leaving: bool) -> None:
        """Has the store keep an entry, if there is one."""
        try:
            if self.store is not None:
                self.store.offer(entry.model, entry.cache, leaving)
        except Exception:  # most likely memory is short
            self.failures += 1

    def _evict(self) -> None:
        """Drops the least recently used entries until the others keep to the limit."""
        while (used := _nbytes(self._entries)) > self.limit_bytes or len(self._entries) > self.MAX_ENTRIES:
            self._offer(self._entries.pop(0), leaving=True)
        self.nbytes = used

    def clear(self) -> None:
        """Drops all entries."""
        self._entries, self.nbytes = [], 0


def _nbytes(entries: Sequence[_Entry]) -> int:
    """Bytes of entries; a snapshot that several of them share counts once."""
    snapshots = {each: each.nbytes for entry in entries for each in entry.cache.snapshots}
    return sum(entry.nbytes for entry in entries) + sum(snapshots.values())

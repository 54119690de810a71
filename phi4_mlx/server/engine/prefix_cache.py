"""The prefix cache: caches of earlier prompts, reused by prompts with the same prefix, adapter and RoPE table.

Prefixes are compared by keys, which tell two media apart where ids do not.

An entry with snapshots also serves a prompt that diverges from it, up to the last snapshot before they differ. So a
conversation has one entry: the newest, with the snapshots of those that it extends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.tokens.prompt import keys_of, places_of

Keys = NDArray[np.int64]  # [S]


@dataclass(frozen=True, eq=False)
class _Entry:
    adapter: str | None
    keys: Keys
    cache: PromptCache

    @cached_property
    def nbytes(self) -> int:  # without snapshots; first read after compact(): an entry does not change after that
        return self.keys.nbytes + sum(layer.nbytes for layer in self.cache)

    def reusable(self, keys: Keys) -> int:
        """Tokens of a prompt that the entry can serve."""
        return self.cache.reusable(_shared(self.keys, keys))

    def extends(self, other: _Entry) -> bool:
        """True if the tokens of this entry begin with those of `other`, under the same adapter and RoPE table."""
        own, others = (self.adapter, self.cache.options), (other.adapter, other.cache.options)
        same = own == others and self.cache.conditions.hold_for(other.cache.conditions)
        return same and _shared(self.keys, other.keys) == len(other.keys)

    def lacks(self, other: _Entry) -> int:
        """Tokens of `other` that must be prefilled again if this entry replaces it."""
        return len(other.keys) - self.reusable(other.keys) if self.extends(other) else len(other.keys)


class PrefixCache:
    """Entries up to a limit in bytes; the least recently used goes first.

    Attributes:
        limit_bytes: the most bytes of all entries together.
        nbytes: bytes of all entries.
    """

    MIN_SHARED = 8  # tokens; a shorter prefix is as fast to compute
    MAX_LOSS = 0.1  # share of an entry's tokens that may be prefilled again if a longer entry replaces it
    MAX_ENTRIES = 1024  # each is compared with a prompt, in some microseconds

    def __init__(self, limit_bytes: int):
        self.limit_bytes, self.nbytes = limit_bytes, 0
        self._entries: list[_Entry] = []  # the most recently used last

    def __len__(self) -> int:
        return len(self._entries)

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
        places, regime = places_of(ids), model.regime(len(ids))
        wanted = np.array(keys_of(ids, places)[:-1], np.int64)
        same = [each for each in self._entries if (each.adapter, each.cache.options.kv_bits) == (adapter, kv_bits)]
        fitting = [each for each in same if each.cache.serves(places, regime)]
        found = [(each.reusable(wanted), each) for each in fitting]
        length, best = max(found, key=lambda pair: pair[0], default=(0, None))
        if best is None or length < self.MIN_SHARED:
            return None
        self._entries.remove(best)
        self._entries.append(best)
        cache = best.cache.fork(length)
        cache.expect(ids)  # the entry knows only the identity of its media
        cache.mark()  # a snapshot here lets the next entry of the conversation replace this one
        return cache

    def put(self, adapter: str | None, cache: PromptCache) -> None:
        """Stores a copy of a cache, in place of the entries that it extends at a loss of at most `MAX_LOSS`."""
        keys = np.array(cache.keys, np.int64)
        needed = keys.nbytes + sum(array.nbytes for layer in cache for array in layer.state)
        if len(keys) < self.MIN_SHARED or needed > self.limit_bytes:
            return
        entry = _Entry(adapter, keys, cache.fork(cache.offset))
        entry.cache.forget_media()
        if any(each.lacks(entry) <= 1 for each in self._entries):
            return
        entry.cache.compact()  # else slices of a batch would keep all of its rows alive
        for each in self._entries:
            if entry.extends(each):
                entry.cache.snapshots.add(each.cache.snapshots)
        while _nbytes([entry]) > self.limit_bytes and entry.cache.snapshots:
            entry.cache.snapshots.thin(len(entry.cache.snapshots) - 1)
        entries = [*(each for each in self._entries if entry.lacks(each) > self.MAX_LOSS * len(each.keys)), entry]
        while (used := _nbytes(entries)) > self.limit_bytes or len(entries) > self.MAX_ENTRIES:
            entries.pop(0)
        self._entries, self.nbytes = entries, used

    def clear(self) -> None:
        """Drops all entries."""
        self._entries, self.nbytes = [], 0


def _nbytes(entries: Sequence[_Entry]) -> int:
    """Bytes of entries; a snapshot that several of them share counts once."""
    snapshots = {each: each.nbytes for entry in entries for each in entry.cache.snapshots}
    return sum(entry.nbytes for entry in entries) + sum(snapshots.values())


def _shared(a: Keys, b: Keys) -> int:
    """The length of the common prefix of two sequences."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n

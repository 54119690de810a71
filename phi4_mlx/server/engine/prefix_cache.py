"""The prefix cache: caches of earlier prompts, reused by prompts with the same prefix, adapter and RoPE table.

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

Ids = NDArray[np.int32]  # [S]


@dataclass(frozen=True, eq=False)
class _Entry:
    adapter: str | None
    ids: Ids
    cache: PromptCache

    @cached_property
    def nbytes(self) -> int:  # without snapshots; first read after compact(): an entry does not change after that
        return self.ids.nbytes + sum(layer.nbytes for layer in self.cache)

    def reusable(self, ids: Ids) -> int:
        """Tokens of a prompt that the entry can serve."""
        return self.cache.reusable(_shared(self.ids, ids))

    def extends(self, other: _Entry) -> bool:
        """True if the tokens of this entry begin with those of `other`, under the same adapter and RoPE table."""
        same = (self.adapter, self.cache.regime) == (other.adapter, other.cache.regime)
        return same and _shared(self.ids, other.ids) == len(other.ids)

    def lacks(self, other: _Entry) -> int:
        """Tokens of `other` that must be prefilled again if this entry replaces it."""
        return len(other.ids) - self.reusable(other.ids) if self.extends(other) else len(other.ids)


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

    def find(self, model: LanguageModel, adapter: str | None, ids: Sequence[int]) -> PromptCache | None:
        """A cache of the longest known prefix of a prompt, at most all of it except one token.

        Args:
            model: the model that will use the cache.
            adapter: the adapter on it; entries of others are not used.
            ids: the whole prompt; its length decides the RoPE table.
        """
        wanted, key = np.array(ids[:-1], np.int32), (adapter, model.regime(len(ids)))
        found = [(each.reusable(wanted), each) for each in self._entries if (each.adapter, each.cache.regime) == key]
        length, best = max(found, key=lambda pair: pair[0], default=(0, None))
        if best is None or length < self.MIN_SHARED:
            return None
        self._entries.remove(best)
        self._entries.append(best)
        cache = best.cache.fork(length)
        cache.mark()  # a snapshot here lets the next entry of the conversation replace this one
        return cache

    def put(self, adapter: str | None, cache: PromptCache) -> None:
        """Stores a copy of a cache, in place of the entries that it extends at a loss of at most `MAX_LOSS`."""
        ids = np.array(cache.ids[0], np.int32)
        needed = ids.nbytes + sum(array.nbytes for layer in cache for array in layer.state)
        if len(ids) < self.MIN_SHARED or needed > self.limit_bytes:
            return
        entry = _Entry(adapter, ids, cache.fork(cache.offset))
        if any(each.lacks(entry) <= 1 for each in self._entries):
            return
        entry.cache.compact()  # else slices of a batch would keep all of its rows alive
        for each in self._entries:
            if entry.extends(each):
                entry.cache.snapshots.add(each.cache.snapshots)
        while _nbytes([entry]) > self.limit_bytes and entry.cache.snapshots:
            entry.cache.snapshots.thin(len(entry.cache.snapshots) - 1)
        entries = [*(each for each in self._entries if entry.lacks(each) > self.MAX_LOSS * len(each.ids)), entry]
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


def _shared(a: Ids, b: Ids) -> int:
    """The length of the common prefix of two sequences."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n

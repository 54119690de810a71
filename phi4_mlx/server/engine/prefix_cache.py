"""What was computed for earlier prompts, kept for prompts that begin alike, by adapter and RoPE table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from phi4_mlx.models.cache import PromptCache
from phi4_mlx.models.rope import Regime
from phi4_mlx.models.text import Model


@dataclass(frozen=True, eq=False)
class _Entry:
    adapter: str | None
    regime: Regime
    ids: np.ndarray  # [S]
    states: list[tuple[mx.array, mx.array]]  # [1, K, S, Dh] each, by layer

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + sum(array.nbytes for state in self.states for array in state)


class PrefixCache:
    """Entries up to a limit in bytes; the one that has not been of use for longest makes room.

    Attributes:
        limit_bytes: what all entries together may take.
        nbytes: what they take.
    """

    LEAST_SHARED = 8  # tokens; less than that is as fast to compute again
    MOST_ENTRIES = 1024  # each is compared with a prompt, in a microsecond or two

    def __init__(self, limit_bytes: int):
        self.limit_bytes, self.nbytes = limit_bytes, 0
        self._entries: list[_Entry] = []  # the one used last at the end

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, model: Model, adapter: str | None, ids: Sequence[int]) -> PromptCache | None:
        """A cache that holds the longest known beginning of a prompt, at most all of it but one token.

        Args:
            model: whose cache it shall be.
            adapter: the adapter that is on it; what another computed is of no use.
            ids: the whole prompt; its length decides which RoPE table's entries are of use.
        """
        wanted, regime = np.array(ids[:-1], np.int32), model.model.rope.regime(len(ids))
        useful = (entry for entry in self._entries if (entry.adapter, entry.regime) == (adapter, regime))
        shared, best = max(((_shared(entry.ids, wanted), entry) for entry in useful), key=_first, default=(0, None))
        if best is None or shared < self.LEAST_SHARED:
            return None
        self._entries.remove(best)
        self._entries.append(best)
        cache = model.make_cache()
        cache.restore(ids[:shared], [[array[..., :shared, :] for array in state] for state in best.states], regime)
        return cache

    def put(self, adapter: str | None, cache: PromptCache) -> None:
        """Keeps what a cache holds. Entries that it goes on from are given up for it."""
        ids = np.array(cache.ids[0], np.int32)
        # Copies: a slice would keep all of the rows alive that it was cut from.
        states = [tuple(mx.contiguous(array) for array in layer.state) for layer in cache]
        entry = _Entry(adapter, cache.regime, ids, states)
        known = any(_goes_on_from(each, entry) for each in self._entries)
        if known or len(ids) < self.LEAST_SHARED or entry.nbytes > self.limit_bytes:
            return
        kept = [each for each in self._entries if not _goes_on_from(entry, each)]
        used = sum(each.nbytes for each in kept)
        while used + entry.nbytes > self.limit_bytes or len(kept) >= self.MOST_ENTRIES:
            used -= kept.pop(0).nbytes
        mx.eval(states)
        self._entries, self.nbytes = [*kept, entry], used + entry.nbytes

    def clear(self) -> None:
        """Gives up all entries."""
        self._entries, self.nbytes = [], 0


def _first(pair: tuple[int, _Entry | None]) -> int:
    return pair[0]


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids two sequences have in common from their beginning."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n


def _goes_on_from(longer: _Entry, shorter: _Entry) -> bool:
    alike = (longer.adapter, longer.regime) == (shorter.adapter, shorter.regime)
    return alike and len(shorter.ids) <= len(longer.ids) and _shared(longer.ids, shorter.ids) == len(shorter.ids)

"""Caches that are read from the store in a thread, so that running answers do not wait for the disk."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from phi4_mlx.generation.cache_store.store import Found, Read
from phi4_mlx.models.cache import CacheOptions
from phi4_mlx.models.prompt_cache import prefix_of
from phi4_mlx.server.engine.answer import Answer
from phi4_mlx.server.engine.prefix_cache import PrefixCache

IDLE_S = 0.02  # that an engine with nothing else to do waits for a file


class _Waiting(NamedTuple):
    """A job whose prompt begins with a stored one."""

    answer: Answer
    found: Found
    read: Future[Read | None]


class Recalling:
    """The jobs that wait for a file of the store; several jobs may wait for one.

    Args:
        prefixes: where caches go, with their store.
        most_bytes: a larger file is not read.
        options: of the engine's caches.
    """

    def __init__(self, prefixes: PrefixCache, most_bytes: int, options: CacheOptions) -> None:
        self._prefixes, self._most_bytes, self._options = prefixes, most_bytes, options
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache reader")
        self._waiting: list[_Waiting] = []
        self._reads: dict[str, Future[Read | None]] = {}  # by name

    def add(self, answer: Answer) -> bool:
        """Starts to read what the store has of a job's prompt; False if it has no more than memory."""
        store, sequence = self._prefixes.store, answer.sequence
        if store is None:
            return False
        known = self._prefixes.reusable(sequence.model, answer.job.adapter, sequence.ids, sequence.kv_bits)
        found = store.find(sequence.model, sequence.ids, sequence.adapter, self._options, beyond=known)
        if found is None or found.entry.nbytes > self._most_bytes:
            return False
        name = found.entry.name
        if name not in self._reads:
            self._reads[name] = self._thread.submit(store.read, found)
        self._waiting.append(_Waiting(answer, found, self._reads[name]))
        return True

    def done(self, idle: bool) -> list[Answer]:
        """Removes and returns the jobs whose files are read; their caches are in memory.

        Args:
            idle: waits a moment for one.
        """
        if idle and self._reads:
            wait(self._reads.values(), IDLE_S, FIRST_COMPLETED)
        done = [each for each in self._waiting if each.read.done()]
        self._waiting = [each for each in self._waiting if each not in done]
        for each in done:
            self._reads.pop(each.found.entry.name, None)
            self._recall(each)
        return [each.answer for each in done]

    def _recall(self, waiting: _Waiting) -> None:
        """Gives a job what was read for it, unless memory has as much by now."""
        answer, found, store = waiting.answer, waiting.found, self._prefixes.store
        sequence, adapter = answer.sequence, answer.job.adapter
        model, ids, kv_bits = sequence.model, sequence.ids, sequence.kv_bits
        if self._prefixes.reusable(model, adapter, ids, kv_bits) >= found.length:
            return
        read = waiting.read.result()
        cache = None if read is None or store is None else store.restore(read, model, sequence.adapter)
        if cache is None:
            return
        self._prefixes.put(model, adapter, cache)
        if self._prefixes.reusable(model, adapter, ids, kv_bits) < found.length:  # memory has no room to keep it
            sequence.cache = prefix_of(cache, ids, found.length)
            answer.cached_tokens = found.length

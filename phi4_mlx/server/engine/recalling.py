"""Caches that are read from the store in a thread, so that running answers do not wait for the disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from phi4_mlx.generation.cache_store.reading import Read
from phi4_mlx.generation.cache_store.store import Found
from phi4_mlx.models.cache import CacheOptions
from phi4_mlx.models.prompt_cache import PromptCache, prefix_of
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
    """

    def __init__(self, prefixes: PrefixCache, most_bytes: int) -> None:
        self._prefixes, self._most_bytes = prefixes, most_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache reader")
        self._waiting: list[_Waiting] = []
        self._reads: dict[str, Future[Read | None]] = {}  # by name

    def add(self, answer: Answer) -> bool:
        """Starts to read what the store has of a job's prompt; False if it has no more than memory."""
        found = self._found(answer)
        if found is None:
            return False
        name = found.entry.name
        if name not in self._reads:
            assert self._prefixes.store is not None
            self._reads[name] = self._thread.submit(self._prefixes.store.read, found)
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
        restored: dict[tuple[str, str | None], PromptCache | None] = {}
        for each in done:
            name, sequence = each.found.entry.name, each.answer.sequence
            self._reads.pop(name, None)
            with self._counted():
                if self._known(each.answer) < each.found.length:
                    key = name, sequence.adapter
                    if key not in restored:
                        restored[key] = self._restored(each)
                    if (cache := restored[key]) is not None:
                        self._give(each, cache)
        return [each.answer for each in done]

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Counts a failure, which costs a prefill."""
        try:
            yield
        except Exception:
            self._prefixes.failures += 1

    def _known(self, answer: Answer) -> int:
        """Tokens of a job's prompt that are in memory."""
        sequence = answer.sequence
        return self._prefixes.reusable(sequence.model, answer.job.adapter, sequence.ids, sequence.kv_bits)

    def _found(self, answer: Answer) -> Found | None:
        """What the store has of a job's prompt, if it is worth a read."""
        store, sequence, found = self._prefixes.store, answer.sequence, None
        if store is not None:
            with self._counted():
                known, options = self._known(answer), CacheOptions(None, sequence.kv_bits)
                found = store.find(sequence.model, sequence.ids, sequence.adapter, options, beyond=known)
        return None if found is None or found.entry.nbytes > self._most_bytes else found

    def _restored(self, waiting: _Waiting) -> PromptCache | None:
        """The cache of a file, which is in memory from now on."""
        read, store, sequence = waiting.read.result(), self._prefixes.store, waiting.answer.sequence
        cache = None if read is None or store is None else store.restore(read, sequence.model, sequence.adapter)
        if cache is not None:
            self._prefixes.put(sequence.model, waiting.answer.job.adapter, cache)
        return cache

    def _give(self, waiting: _Waiting, cache: PromptCache) -> None:
        """Gives a job its cache, where memory has no room to keep it."""
        answer, length = waiting.answer, waiting.found.length
        if self._known(answer) < length:
            answer.sequence.cache = prefix_of(cache, answer.sequence.ids, length)
            answer.cached_tokens = length

"""The cache store: it finds the caches of earlier prompts in a folder, and has new ones written by a thread.

A step of generation never waits for a write: it hands over arrays that are computed already, and the thread reads their
memory. What cannot be written or read costs a prefill, and one line.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from phi4_mlx.errors import CheckpointError, message_of
from phi4_mlx.files.safetensors import header_of
from phi4_mlx.generation.cache_store.catalogue import Catalogue
from phi4_mlx.generation.cache_store.entries import (
    MAX_LOSS,
    Match,
    StoredEntry,
    hold,
    match_of,
    packed,
    projection_of,
)
from phi4_mlx.generation.cache_store.fingerprints import Fingerprints
from phi4_mlx.generation.cache_store.folder import SUFFIX, StoreFolder, private_folder
from phi4_mlx.generation.cache_store.reading import Read, read_file
from phi4_mlx.generation.cache_store.writer import SETTLE_S, Waiting, Writer
from phi4_mlx.generation.prompt_cache_content import (
    Tokenizer,
    cache_of,
    content_of,
    memory_of,
    own_metadata,
    shape,
)
from phi4_mlx.models.cache import CacheOptions
from phi4_mlx.models.cached_tokens import conditions_of
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache, prefix_of
from phi4_mlx.models.shared_stream import shared_stream
from phi4_mlx.terminal.amount import size as amount_of
from phi4_mlx.tokens.prompt import keys_of, places_of

MIN_TOKENS = 32  # of a stored cache, and that a file must save; fewer are as fast to prefill
READ_COST = 1 / 16  # of a token read and checked, in tokens prefilled: 128 KB at 1 GB/s, against 2 ms on an M1
READY_S = 10.0  # that the first look-up waits for the headers of thousands of files


@dataclass(frozen=True)
class StoreSettings:
    """The settings of a store, which may cross to another process.

    Attributes:
        folder: the folder, from `private_folder`.
        limit_bytes: the most bytes of its files.
    """

    folder: str
    limit_bytes: int

    def make_store(self, model: LanguageModel, tokenizer: Tokenizer, warn: Callable[[str], None]) -> CacheStore:
        """Opens the store; see `CacheStore`.

        Raises:
            RequestError: the folder cannot be used any more.
        """
        return CacheStore(StoreFolder(private_folder(self.folder), self.limit_bytes), model, tokenizer, warn)


def store_settings(folder: str | None, limit_bytes: int) -> StoreSettings | None:
    """The settings of a store in a folder that is checked and made private; None for none.

    Raises:
        RequestError: the folder cannot be used.
    """
    return None if folder is None else StoreSettings(str(private_folder(folder)), limit_bytes)


@dataclass(frozen=True)
class Found:
    """A cache in the store that serves a prompt.

    Attributes:
        entry: its entry.
        length: tokens of the prompt that it serves.
    """

    entry: StoredEntry
    length: int


class CacheStore:
    """Caches of earlier prompts in a folder.

    Args:
        folder: the folder.
        model: whose fingerprint is computed at once, in a thread; it reads all weights.
        tokenizer: of the model.
        warn: called, also by other threads, with one line about a file that is dropped or a disk that refuses a write.

    Attributes:
        hits: caches read so far.
    """

    def __init__(
        self, folder: StoreFolder, model: LanguageModel, tokenizer: Tokenizer, warn: Callable[[str], None]
    ) -> None:
        self._folder, self._warn = folder, warn
        self._catalogue = Catalogue(folder, warn)
        self._fingerprints = Fingerprints(tokenizer)
        self._unread = self._unstorable = self.hits = 0
        self._writer = Writer(folder, self._catalogue, warn)
        threading.Thread(target=self._fingerprints.of, args=(model, None), name="fingerprint").start()

    def reopened(self, model: LanguageModel, tokenizer: Tokenizer) -> CacheStore:
        """A store in the same folder for another model; close this one."""
        return CacheStore(self._folder, model, tokenizer, self._warn)

    def find(
        self,
        model: LanguageModel,
        ids: Sequence[int],
        adapter: str | None = None,
        options: CacheOptions | None = None,
        beyond: int = 0,
    ) -> Found | None:
        """The stored cache that saves a prompt the most; None if none saves enough to be read.

        Args:
            model: the model that will use it.
            ids: the whole prompt, a `Prompt` if there are media; at least its last token is left to prefill.
            adapter: the user's adapter, by its name on the model.
            options: those of the cache; None for the usual ones.
            beyond: tokens of the prompt that are in memory anyway.
        """
        if len(ids) - 1 - beyond < MIN_TOKENS:
            return None
        self._writer.ready.wait(READY_S)
        match, projection = self._wanted(model, ids, adapter, options or CacheOptions())
        keys, best = packed(keys_of(ids, places_of(ids))[:-1]), None
        for entry in self._catalogue.matching(match):
            least = beyond + max(MIN_TOKENS, int(len(entry) * READ_COST))
            if best is not None:
                least = max(least, best.length + 1)
            length = entry.reusable(keys, least) if hold(entry.projection, projection) else 0
            if length >= least:
                best = Found(entry, length)
        return best

    def read(self, found: Found) -> Read | None:
        """Reads and checks a file; any thread may do it. None if it is gone or damaged."""
        try:
            read = read_file(self._folder.path / found.entry.name)
        except CheckpointError as error:
            self._missed(found.entry.name, message_of(error), unreadable=isinstance(error.__context__, OSError))
            return None
        self._writer.touch(found.entry.name)
        return read

    def restore(self, read: Read, model: LanguageModel, adapter: str | None = None) -> PromptCache | None:
        """The cache of a file, for the thread that generates; None if it does not fit the model.

        Args:
            read: from `read`; the second call gets None, since the first has taken its arrays.
            model, adapter: those of `find`.

        Returns:
            A cache of all tokens of the file.
        """
        own = own_metadata(read.header.metadata)
        if "named_adapter" in own and adapter is not None:
            own["named_adapter"] = adapter  # the same tensors may have another name by now
        try:
            with shared_stream():
                tensors = read.take_tensors()
                if not tensors:
                    return None
                cache = cache_of(read.path, model, lambda name: self._fingerprints.of(model, name), own, tensors)
        except CheckpointError as error:
            self._missed(read.path.name, message_of(error), unreadable=False)
            return None
        self.hits += 1
        return cache

    def load(
        self, found: Found, model: LanguageModel, ids: Sequence[int], adapter: str | None = None
    ) -> PromptCache | None:
        """A cache of the prompt's first `found.length` tokens; None if it cannot be read."""
        try:
            read = self.read(found)
            cache = None if read is None else self.restore(read, model, adapter)
            if cache is None:
                return None
            with shared_stream():
                return prefix_of(cache, ids, found.length)
        except Exception:  # most likely memory is short; costs a prefill
            self._unread += 1
            return None

    def offer(self, model: LanguageModel, cache: PromptCache, leaving: bool = False) -> None:
        """Has a cache written soon, unless the store has nearly all of it.

        Args:
            model: the model that filled it.
            cache: of one sequence, after `compact`; it must not change any more.
            leaving: True if it leaves memory: it is written at once, unless the store has all of it.
        """
        stray = not cache.places and not cache.serves((), cache.regime)  # under the adapter of media cut off
        if cache.offset < MIN_TOKENS or stray:
            return
        with shared_stream():
            fingerprints, keys = self._fingerprints.of(model, cache.adapter), packed(cache.keys)
            match = match_of({**fingerprints, **shape(cache.options, cache.regime, len(cache))})
            name = hashlib.sha256(json.dumps(match).encode() + keys).hexdigest()[:32] + SUFFIX
            snapshots = tuple(each.length for each in cache.snapshots) if cache.needs_snapshots else None
            entry = StoredEntry(name, 0, match, projection_of(cache.places), keys, snapshots)
            if self._has(entry, leaving):
                return
            content = content_of(cache, fingerprints, {})
            layout, about = content.layout, content.about
            arrays = [mx.contiguous(each).view(mx.uint8) for each in content.tensors.values()]
            mx.eval(arrays)
            buffers = [memory_of(each) for each in arrays]
        size = len(header_of(layout, about)) + sum(each.nbytes for each in buffers) + 32
        if size > self._folder.limit_bytes:
            return self._too_large(size)
        entry = StoredEntry(name, size, match, entry.projection, keys, snapshots)
        due_s = 0.0 if leaving else time.monotonic() + SETTLE_S
        self._writer.add(Waiting(entry, layout, about, buffers, due_s, leaving))

    def flush(self, timeout_s: float) -> bool:
        """Writes all that was offered; returns False if that takes longer."""
        return self._writer.flush(timeout_s)

    def close(self, timeout_s: float) -> bool:
        """As `flush`, and ends the thread."""
        return self._writer.close(timeout_s)

    def gauges(self) -> dict[str, float]:
        """Counts and bytes by metric name."""
        failures = self._unread + self._unstorable + self._writer.failures + self._catalogue.damaged
        return {
            "prefix_cache_disk_bytes": self._catalogue.nbytes,
            "prefix_cache_disk_limit_bytes": self._folder.limit_bytes,
            "prefix_cache_disk_entries": len(self._catalogue),
            "prefix_cache_disk_hits_total": self.hits,
            "prefix_cache_disk_failures_total": failures,
        }

    def _too_large(self, nbytes: int) -> None:
        """Counts a cache that can never be stored, and says so once."""
        self._unstorable += 1
        if self._unstorable == 1:
            limit = amount_of(self._folder.limit_bytes)
            self._warn(f"a prompt cache of {amount_of(nbytes)} is not stored: all of them may have {limit} on the disk")

    def _has(self, entry: StoredEntry, leaving: bool) -> bool:
        """True if the store has enough of a cache, or soon will."""
        allowed = MIN_TOKENS if leaving else MAX_LOSS * len(entry)
        for each in self._catalogue.matching(entry.match):
            if each.serves(entry, allowed):
                self._writer.touch(each.name)
                return True
        for waiting in self._writer.waiting:
            if waiting.entry.serves(entry):
                if leaving:
                    self._writer.hasten(waiting.entry)
                return True
        return False

    def _wanted(
        self, model: LanguageModel, ids: Sequence[int], adapter: str | None, options: CacheOptions
    ) -> tuple[Match, str | None]:
        """What an entry must match to serve a prompt, and the projection of the prompt's sounds."""
        empty = model.make_cache(**vars(options))
        regime = options.regime or model.regime(len(ids))
        needed = conditions_of(places_of(ids), regime, adapter, empty.mode_adapters)
        about = {**self._fingerprints.of(model, needed.adapter), **shape(options, regime, len(empty))}
        return match_of(about), needed.projection

    def _missed(self, name: str, reason: str, unreadable: bool) -> None:
        """Counts a file that could not be used; a damaged one is dropped, with one line."""
        if unreadable:  # most often another process has dropped it
            self._unread += 1
            self._catalogue.forget([name])
        else:
            self._catalogue.drop(name, reason)

"""The catalogue of a store: the entries of all its files, read from their headers once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from phi4_mlx.errors import CheckpointError, message_of
from phi4_mlx.generation.cache_store.entries import Match, StoredEntry, read_entry
from phi4_mlx.generation.cache_store.folder import StoreFolder

MAX_ENTRIES = 20_000  # compared with a prompt; older files are left unread
SETTLED_NS = (
    10**8
)  # since a folder's change; clocks of file systems tick in steps, and another change may follow in one


class Catalogue:
    """Entries by what must match; any thread may look, one at a time changes it.

    Args:
        folder: the files.
        warn: called with one line about a file that is dropped.

    Attributes:
        nbytes: bytes of all files, when they were last counted.
        files: their number.
        damaged: files dropped so far.
    """

    def __init__(self, folder: StoreFolder, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._entries: dict[str, StoredEntry | None] = {}  # by name; None for one of another version, or unread
        self._by_match: dict[Match, tuple[StoredEntry, ...]] = {}
        self._turn = threading.RLock()
        self._seen_ns = -1
        self.nbytes = self.files = self.damaged = 0

    def matching(self, match: Match) -> Sequence[StoredEntry]:
        """The entries with these fingerprints, versions, RoPE table and options."""
        return self._by_match.get(match, ())

    def refresh(self) -> None:
        """Reads the headers of new files, and forgets those that are gone, if the folder has changed."""
        with self._turn:
            changed_ns = self._folder.changed_ns
            if changed_ns == self._seen_ns:
                return
            files = [file for file in self._folder.files() if not file.partial]
            gone = self._entries.keys() - {file.name for file in files}
            self._remove(gone)
            new = [file.name for file in files if file.name not in self._entries][-MAX_ENTRIES:]
            for name in reversed(new):  # the latest first
                self._entries[name] = self._read(name)
            self._group({entry.match for name in new if (entry := self._entries[name]) is not None})
            settled = time.time_ns() - changed_ns > SETTLED_NS
            self._seen_ns = changed_ns if settled else -1
            self.nbytes, self.files = sum(file.nbytes for file in files), len(files)

    def add(self, entry: StoredEntry) -> None:
        """Adds the entry of a file that has just been written."""
        with self._turn:
            self._entries[entry.name] = entry
            self._group({entry.match})

    def forget(self, names: Iterable[str]) -> None:
        """Removes entries whose files are gone."""
        with self._turn:
            self._remove(names)

    def drop(self, name: str, reason: str) -> None:
        """Removes a damaged file and its entry; says so in one line."""
        self.damaged += 1
        self.forget([name])
        with contextlib.suppress(OSError):
            self._folder.drop(name)
        self._warn(reason)

    def _read(self, name: str) -> StoredEntry | None:
        try:
            return read_entry(self._folder.path / name)
        except CheckpointError as error:
            if not isinstance(error.__context__, OSError):  # else it is gone, or there are too many open files
                self.drop(name, message_of(error))
            return None

    def _remove(self, names: Iterable[str]) -> None:
        removed = [self._entries.pop(name, None) for name in [*names]]
        self._group({entry.match for entry in removed if entry is not None})

    def _group(self, matches: Iterable[Match]) -> None:
        """Makes the groups of these matches anew; a reader keeps the old ones."""
        for match in matches:
            group = tuple(each for each in self._entries.values() if each is not None and each.match == match)
            self._by_match[match] = group

"""The catalogue of a store: the entries of all its files, read from their headers once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from phi4_mlx.errors import CheckpointError, message_of
from phi4_mlx.generation.cache_store.entries import Match, StoredEntry, read_entry
from phi4_mlx.generation.cache_store.folder import StoredFile, StoreFolder

MAX_ENTRIES = 20_000  # compared with a prompt; older files are left unread
SETTLED_NS = 10**8  # since a folder's change: clocks of file systems tick in steps, and one may hide a second change


class Catalogue:
    """Entries by what must match; any thread may look, one at a time changes it.

    Args:
        folder: the files.
        warn: called with one line about a file that is dropped.

    Attributes:
        damaged: files dropped so far.
    """

    def __init__(self, folder: StoreFolder, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._sizes: dict[str, int] = {}  # of all files, by name
        self._entries: dict[str, StoredEntry] = {}  # of those that have this version
        self._by_match: dict[Match, tuple[StoredEntry, ...]] = {}
        self._turn = threading.RLock()
        self._seen_ns = -1
        self.damaged = 0

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        with self._turn:
            return sum(self._sizes.values())

    def matching(self, match: Match) -> Sequence[StoredEntry]:
        """The entries with these fingerprints, versions, RoPE table and options."""
        return self._by_match.get(match, ())

    def refresh(self) -> None:
        """Takes the files of the folder, if it has changed."""
        changed_ns = self._folder.changed_ns
        if changed_ns != self._seen_ns:
            self.take(self._folder.files())
            self._seen_ns = changed_ns if time.time_ns() - changed_ns > SETTLED_NS else -1

    def take(self, files: Sequence[StoredFile]) -> None:
        """Reads the headers of new and rewritten files, the last ones first, and forgets those not among `files`."""
        whole = {file.name: file.nbytes for file in files if not file.partial}
        with self._turn:
            self.forget(self._sizes.keys() - whole.keys())
            new = [name for name, nbytes in whole.items() if self._sizes.get(name) != nbytes]
        for name in reversed(new[-MAX_ENTRIES:]):
            self._read(name)
        with self._turn:
            self._sizes |= whole
            self._group({entry.match for name in new if (entry := self._entries.get(name)) is not None})

    def add(self, entry: StoredEntry) -> None:
        """Adds the entry of a file that has just been written, under the folder's lock."""
        with self._turn:
            self._sizes[entry.name], self._entries[entry.name] = entry.nbytes, entry
            self._group({entry.match})

    def forget(self, names: Iterable[str]) -> None:
        """Removes files that are gone."""
        with self._turn:
            names = [*names]
            for name in names:
                self._sizes.pop(name, None)
            removed = [self._entries.pop(name, None) for name in names]
            self._group({entry.match for entry in removed if entry is not None})

    def drop(self, name: str, reason: str) -> None:
        """Removes a damaged file and its entry; says so in one line."""
        self.damaged += 1
        self.forget([name])
        with contextlib.suppress(OSError):
            self._folder.drop(name)
        self._warn(reason)

    def _read(self, name: str) -> None:
        try:
            entry = read_entry(self._folder.path / name)
        except CheckpointError as error:
            if not isinstance(error.__context__, OSError):  # else it is gone, or there are too many open files
                self.drop(name, message_of(error))
            return
        if entry is not None:
            with self._turn:
                self._entries[name] = entry

    def _group(self, matches: Iterable[Match]) -> None:
        """Makes the groups of these matches anew; a reader keeps the old ones."""
        for match in matches:
            self._by_match[match] = tuple(each for each in self._entries.values() if each.match == match)

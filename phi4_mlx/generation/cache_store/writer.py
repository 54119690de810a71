"""The thread that writes caches to a store, and keeps the catalogue up to date."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from phi4_mlx.errors import RequestError, message_of
from phi4_mlx.generation.cache_store.catalogue import Catalogue
from phi4_mlx.generation.cache_store.entries import StoredEntry
from phi4_mlx.generation.cache_store.folder import StoreFolder
from phi4_mlx.generation.prompt_cache_content import write_content

SETTLE_S = 2.0  # until a cache that stays in memory is written, so that one which replaces it soon is written alone
REFRESH_S = 2.0  # between two looks at what other processes have stored
LOCK_S = 0.05  # between two tries to lock the folder
PAUSE_S = 60.0  # without writing, after the disk has refused it
MAX_LEAVING_BYTES = 2**30  # of caches that have left memory and wait to be written; one alone may be larger


@dataclass(eq=False)
class Waiting:
    """A cache that waits to be written.

    Attributes:
        entry: its entry.
        layout, about, buffers: for `write_content`.
        due_s: when it is written, on the monotonic clock.
        leaving: True if nothing else keeps it in memory.
    """

    entry: StoredEntry
    layout: Mapping[str, tuple[str, Sequence[int]]]
    about: Mapping[str, str]
    buffers: list[memoryview] = field(repr=False)
    due_s: float
    leaving: bool


class Writer:
    """Writes what waits, the first that is due first.

    Its thread computes nothing with MLX, which aborts where such a thread outlives the interpreter.

    Args:
        folder: where to.
        catalogue: of the folder.
        warn: called with one line when the disk refuses a write.

    Attributes:
        waiting: the caches that wait.
        failures: caches that could not be written.
        ready: set once the headers of all files have been read.
    """

    def __init__(self, folder: StoreFolder, catalogue: Catalogue, warn: Callable[[str], None]) -> None:
        self._folder, self._catalogue, self._warn = folder, catalogue, warn
        self._change = threading.Condition()
        self._touched: set[str] = set()
        self._writing = self._closed = False
        self._paused_until_s = 0.0
        self.waiting: list[Waiting] = []
        self.failures = 0
        self.ready = threading.Event()
        self._thread = threading.Thread(target=self._work, name="cache store", daemon=True)
        self._thread.start()

    def add(self, new: Waiting) -> None:
        """Adds a cache, in place of those that it replaces."""
        with self._change:
            replaced = [each for each in self.waiting if new.entry.replaces(each.entry)]
            new.due_s = min([new.due_s, *(each.due_s for each in replaced)])
            self.waiting = [*(each for each in self.waiting if each not in replaced), new]
            self._bound()
            self._change.notify_all()

    def hasten(self, entry: StoredEntry) -> None:
        """Writes a waiting cache now, since it leaves memory."""
        with self._change:
            for each in self.waiting:
                if each.entry is entry:
                    each.due_s, each.leaving = 0.0, True
            self._bound()
            self._change.notify_all()

    def touch(self, name: str) -> None:
        """Notes the use of a file."""
        with self._change:
            self._touched.add(name)

    def flush(self, timeout_s: float) -> bool:
        """Writes all that waits; returns False if that takes longer."""
        with self._change:
            for each in self.waiting:
                each.due_s = 0.0
            self._change.notify_all()
            return self._change.wait_for(lambda: not self.waiting and not self._writing, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """As `flush`, and ends the thread."""
        whole = self.flush(timeout_s)
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join(timeout_s if whole else 0.0)
        return whole

    def _bound(self) -> None:
        """Gives up the first of those that have left memory, until the others keep to `MAX_LEAVING_BYTES`."""
        leaving = [each for each in self.waiting if each.leaving]
        while len(leaving) > 1 and sum(each.entry.nbytes for each in leaving) > MAX_LEAVING_BYTES:
            lost = leaving.pop(0)
            self.waiting = [each for each in self.waiting if each is not lost]  # others may read the old list
            self.failures += 1

    def _work(self) -> None:
        for task in (self._tidy, self._refresh):
            with contextlib.suppress(Exception):  # the first write says what is wrong
                task()
        self.ready.set()
        while not self._closed:
            with contextlib.suppress(Exception):  # the next look at the folder may succeed
                self._take_turn()

    def _tidy(self) -> None:
        """Removes what killed writers have left, and what a limit lower than before has no room for."""
        with self._folder.locked(lambda: False):
            self._folder.make_room(0, self._folder.files())

    def _take_turn(self) -> None:
        """Waits for a cache that is due and writes it, or looks at the folder."""
        waiting = self._next()
        if waiting is None:
            return self._refresh()
        try:
            self._write(waiting)
        except Exception:  # a cache that is not stored costs a prefill
            self.failures += 1
        finally:
            with self._change:
                self._writing = False
                self._change.notify_all()

    def _next(self) -> Waiting | None:
        """The cache that is due, once there is one; None when it is time to look at the folder, and at the end."""
        with self._change:
            now = time.monotonic()
            look_s = now + REFRESH_S
            while not self._closed and now < look_s:
                due = min(self.waiting, key=lambda each: each.due_s, default=None)
                if due is not None and due.due_s <= now:
                    self.waiting = [each for each in self.waiting if each is not due]
                    self._writing = True
                    return due
                self._change.wait(min(look_s, look_s if due is None else due.due_s) - now)
                now = time.monotonic()
        return None

    def _write(self, waiting: Waiting) -> None:
        """Writes a cache, unless the store has it by now; removes the files that it replaces."""
        entry, catalogue = waiting.entry, self._catalogue
        if time.monotonic() < self._paused_until_s:
            self.failures += 1
            return
        try:
            with self._folder.locked(self._wait_for_lock):
                self._touch()
                files = self._folder.files()
                catalogue.take(files)
                if any(each.serves(entry) for each in catalogue.matching(entry.match)):
                    return
                catalogue.forget(self._folder.make_room(entry.nbytes, files))
                write_content(self._folder.path / entry.name, waiting.layout, waiting.about, waiting.buffers)
                catalogue.add(entry)
                replaced = [each.name for each in catalogue.matching(entry.match) if entry.replaces(each)]
                replaced.remove(entry.name)
                catalogue.forget(replaced)
                for name in replaced:
                    self._folder.drop(name)
        except TimeoutError:
            self.failures += 1
        except (OSError, RequestError) as error:
            self.failures += 1
            self._paused_until_s = time.monotonic() + PAUSE_S
            reason = (isinstance(error, OSError) and error.strerror) or message_of(error)
            self._warn(f"a prompt cache cannot be written to {self._folder.path}: {reason}; {PAUSE_S:g} s without one")

    def _wait_for_lock(self) -> bool:
        """Waits while another process writes; False at the end."""
        time.sleep(LOCK_S)
        return not self._closed

    def _touch(self) -> None:
        """Notes the uses of files in the folder."""
        with self._change:
            touched, self._touched = self._touched, set()
        for name in touched:
            self._folder.touch(name)

    def _refresh(self) -> None:
        """Looks at what other processes have done."""
        self._touch()
        with contextlib.suppress(OSError):  # the folder is gone: the next write says so
            self._catalogue.refresh()

"""The folder of a cache store: private to its owner, never larger than its limit, and shared by several processes.

A write holds the folder's lock. So writers see each other's files, and the limit holds for all of them together; a
hidden file that is there under the lock belongs to a writer that was killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from phi4_mlx.errors import RequestError
from phi4_mlx.files.lock import lock

OPTION = "--prompt-cache-dir"
SUFFIX = ".promptcache"
SPARE, SPARE_BYTES = 0.05, 10**9  # of the volume, that is left free for others: the smaller of the two
_OURS = re.compile(r"[0-9a-f]{32}\.promptcache|\.[0-9a-f]{32}\.promptcache\.\d+-\d+\.partial")


@dataclass(frozen=True)
class StoredFile:
    """A file of the store.

    Attributes:
        name: of the file.
        nbytes: its size.
        used_ns: the time of its last use, in nanoseconds.
    """

    name: str
    nbytes: int
    used_ns: int

    @property
    def partial(self) -> bool:
        """True for one that is not complete."""
        return self.name.startswith(".")


def private_folder(given: str | Path) -> Path:
    """The folder of a store, made if it is missing, and readable by its owner alone.

    Raises:
        RequestError: it is not a folder, is a link, belongs to another user, cannot be written, has no locks, or holds
            other files and is open to other users.
    """
    path = Path(os.path.abspath(os.path.expanduser(given)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise RequestError(f"{OPTION} {given} is a link; name the folder itself, {os.path.realpath(path)}")
        if not stat.S_ISDIR(status.st_mode):
            raise RequestError(f"{OPTION} {given} exists and is not a folder; name another one")
        if status.st_uid != os.geteuid():
            raise RequestError(
                f"{OPTION} {given} belongs to another user (id {status.st_uid}), who could read or change what is "
                "stored; name a folder of your own"
            )
        if stat.S_IMODE(status.st_mode) & 0o077:
            _close_to_others(path, given)
        _try_to_write(path)
    except OSError as error:
        in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "a part of its path is a file" if in_the_way else error.strerror or type(error).__name__
        raise RequestError(f"{OPTION} {given} cannot be used: {reason}; name a folder that can be written") from None
    return path


def _close_to_others(path: Path, given: str | Path) -> None:
    """Takes a folder's permissions for others away, if nothing but our files is in it."""
    strange = next((each.name for each in os.scandir(path) if not _OURS.fullmatch(each.name)), None)
    if strange is not None:
        raise RequestError(
            f"{OPTION} {given} is open to other users and holds {strange:.100}, which is not of the store; name a "
            "folder that is used for nothing else"
        )
    path.chmod(0o700)


def _try_to_write(path: Path) -> None:
    probe = path / f".probe.{os.getpid()}"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        os.close(descriptor)
    finally:
        probe.unlink(missing_ok=True)
    with contextlib.suppress(BlockingIOError):  # another process writes now
        os.close(lock(path, _opened))


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


class StoreFolder:
    """The files of a store.

    Args:
        path: from `private_folder`.
        limit_bytes: the most bytes of all files together, those of other models included.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path, self.limit_bytes = path, limit_bytes

    @property
    def changed_ns(self) -> int:
        """The time of the last change of a name in the folder, in nanoseconds."""
        return self.path.stat().st_mtime_ns

    def files(self) -> list[StoredFile]:
        """All files of the store, the least recently used first."""
        found = []
        with os.scandir(self.path) as entries:
            for each in entries:
                if _OURS.fullmatch(each.name):
                    with contextlib.suppress(FileNotFoundError):  # another process has just dropped it
                        status = each.stat(follow_symlinks=False)
                        found.append(StoredFile(each.name, status.st_size, status.st_mtime_ns))
        return sorted(found, key=lambda file: file.used_ns)

    @contextlib.contextmanager
    def locked(self, wait: Callable[[], bool]) -> Iterator[None]:
        """Holds the lock of the folder.

        Args:
            wait: called while another process holds the lock; waits a moment, and returns False to give up.

        Raises:
            TimeoutError: `wait` gave up.
            OSError: the folder is gone.
        """
        while True:
            try:
                descriptor = lock(self.path, _opened)
                break
            except BlockingIOError:
                if not wait():
                    raise TimeoutError(errno.ETIMEDOUT, "another process writes to the store") from None
        try:
            yield
        finally:
            os.close(descriptor)

    def make_room(self, nbytes: int, files: Sequence[StoredFile]) -> list[str]:
        """Removes the least recently used files until `nbytes` more fit.

        Args:
            nbytes: of the file to write; 0 keeps the store to its own limit alone.
            files: those that are there, from `files` under the lock.

        Returns:
            The names of the removed files.

        Raises:
            OSError: they would never fit on this volume, of which `SPARE` is left to others; nothing is removed.
        """
        used, limit = sum(file.nbytes for file in files), self.limit_bytes
        if nbytes:
            volume = shutil.disk_usage(self.path)
            limit = min(limit, used + volume.free - min(SPARE_BYTES, int(SPARE * volume.total)))
        if nbytes > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        removed = []
        for file in sorted(files, key=lambda file: not file.partial):  # what killed writers have left goes first
            if used + nbytes > limit or file.partial:
                self.drop(file.name)
                removed.append(file.name)
                used -= file.nbytes
        return removed

    def drop(self, name: str) -> None:
        """Removes a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def touch(self, name: str) -> None:
        """Notes that a file is used now."""
        with contextlib.suppress(OSError):  # gone meanwhile
            os.utime(self.path / name)

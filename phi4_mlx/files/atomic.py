"""phi4_mlx.files.atomic."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from phi4_mlx.errors import RequestError


def sync(path: Path) -> None:
    """Sees to it that a file or a folder is on the disk, not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to, which becomes `path` when all went well, and is gone when anything did not.

    Raises:
        RequestError: what is there is no regular file.
    """
    if path.exists() and not path.is_file():
        raise RequestError(f"{path} is there and is no regular file, so it is not replaced; name another file")
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # of a run that was killed
    try:
        yield partial
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_or_absent(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` when all went well, and is gone when anything did not.

    A run that was killed leaves its folder behind, without its lock; the next run to the same target clears it.

    Raises:
        RequestError: `target` exists already, or cannot be written.
    """
    target = Path(os.path.abspath(os.path.expanduser(target)))
    if os.path.lexists(target):
        raise RequestError(f"{target} already exists; remove it, or name another folder")
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            try:
                for left in partial.iterdir():
                    shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
                yield partial
                sync(partial)
                partial.rename(target)
                sync(target.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise RequestError(f"{target} cannot be written: {reason}; nothing was left there") from None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes the folder, or takes over one that nobody holds; the lock ends with the process, however it ends."""
    lock = None
    while lock is None:
        folder.mkdir(exist_ok=True)
        lock = _lock(folder)
    try:
        yield
    finally:
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder; None if its owner has renamed or removed it in the meantime."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(folder.stat(), os.fstat(lock)):
            return lock
    except FileNotFoundError:
        pass
    except BlockingIOError:
        os.close(lock)
        raise RequestError(f"{folder} belongs to another process, still running; wait for it to end") from None
    os.close(lock)
    return None

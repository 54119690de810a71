"""Files and folders that are written whole or not at all.

`replacing` writes a file and `whole_or_absent` a folder. Both write under a hidden name beside the target, flush to the
disk, and rename: a run that fails or is killed leaves the target as it was. Of several writers of one file, each writes
its own copy and the last rename wins; a folder has one writer at a time.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from phi4_mlx.errors import RequestError
from phi4_mlx.files.lock import lock

_writes = itertools.count()
_WRITER = re.compile(r"\.(\d{1,19})-\d+\.partial$")  # its process and the number of its write


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Writes a file whole or not at all, over an older one if there is one.

    Args:
        path: the file to write.

    Returns:
        A context whose value is a path where no file exists yet. When the context ends without an exception, the file
        that was written there is flushed to the disk and renamed to `path`; after an exception it is removed.

    Raises:
        RequestError: `path` exists and is not a regular file.
        OSError: the file cannot be written; an older one is still in place.
    """
    if path.exists() and not path.is_file():
        raise RequestError(f"{path} exists and is not a regular file, so it is not replaced; name another file")
    partial = _own_partial(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_or_absent(target: Path) -> Iterator[Path]:
    """Writes a new folder whole or not at all.

    A killed run leaves its hidden folder behind, unlocked; the next run to the same target empties it.

    Args:
        target: the folder to make; its parents are made too.

    Returns:
        A context whose value is an empty folder. When the context ends without an exception, everything in that folder
        is flushed to the disk and the folder is renamed to `target`; after an exception it is removed.

    Raises:
        RequestError: `target` exists already, cannot be written, or is being written by another process.
    """
    target = Path(os.path.abspath(os.path.expanduser(target)))
    if os.path.lexists(target):
        raise RequestError(f"{target} already exists; remove it, or name another folder")
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(partial, target)
        try:
            _empty(partial)
            yield partial
            for path in (*partial.rglob("*"), partial):
                sync(path)
            partial.rename(target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise RequestError(f"{target} cannot be written: {reason}; nothing was left there") from None


def sweep(folder: Path, pattern: str) -> None:
    """Removes the hidden files of writers that were killed while they replaced a file.

    Args:
        folder: of the files.
        pattern: of the names that were to be written, such as "*.json".
    """
    for left in folder.glob(f".{pattern}.*.partial"):
        writer = _WRITER.search(left.name)
        if writer and not _is_running(writer[1]):
            with contextlib.suppress(OSError):  # another user's, or gone
                left.unlink()


def sync(path: Path) -> None:
    """Flushes a file or a folder from the system's memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network disks flush no folders
            raise
    finally:
        os.close(descriptor)


def _own_partial(path: Path) -> Path:
    """A hidden name beside `path` for this writer alone; removes the files of writers that were killed."""
    sweep(path.parent, glob.escape(path.name))
    return path.with_name(f".{path.name}.{os.getpid()}-{next(_writes)}.partial")


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _lock(folder: Path, target: Path) -> int:
    """Makes the hidden folder of a target, or takes over an unlocked one; returns a descriptor that locks it."""

    def opened(folder: Path) -> int:
        folder.mkdir(exist_ok=True)
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    try:
        return lock(folder, opened)
    except BlockingIOError:
        raise RequestError(f"another process is writing {target}; wait until it ends, or name another folder") from None

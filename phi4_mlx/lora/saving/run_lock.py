"""The lock of a run's folder: one run writes it at a time. The system drops the lock when the process ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.lock import lock
from phi4_mlx.files.regular_file import read_regular

LOCK_FILE = ".lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ENOSYS)


@contextlib.contextmanager
def locked(folder: Path, warn: Callable[[str], Any]) -> Iterator[None]:
    """Makes a run's folder and locks it; removes the lock at the end, and a new folder that is still empty.

    Args:
        folder: the run's folder.
        warn: called with a message if the file system has no locks, as some network disks.

    Raises:
        RequestError: another run has the lock, or the path is not a folder or cannot be written.
    """
    path = folder / LOCK_FILE
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is not a folder; name another --adapter-path")
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path, warn)
    except OSError as error:
        raise RequestError(f"{folder} cannot be written: {error.strerror}; name another --adapter-path") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty, or gone already
            path.unlink()
            if is_new:
                folder.rmdir()
        os.close(descriptor)


def _lock(path: Path, warn: Callable[[str], Any]) -> int:
    """An open descriptor of the locked file, with our process number in it."""
    try:
        descriptor = lock(path, _open)
    except BlockingIOError:
        owner = ""
        with contextlib.suppress(OSError):  # it has just ended
            owner = read_regular(path).decode("ascii", "replace")
        process = f"process {owner}" if owner.isdigit() else "another process"
        raise RequestError(
            f"{path.parent} is in use: {process} is training there; wait until it ends, stop it, or name another "
            "--adapter-path"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warn(f"warning: {path.parent} cannot be locked: {error.strerror}; start no second run in it")
        return _open(path)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)

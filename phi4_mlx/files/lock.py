"""The lock of a file or a folder, which one process holds. The system drops it when the process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path


def lock(path: Path, opened: Callable[[Path], int]) -> int:
    """Locks a file or a folder until the returned descriptor is closed.

    Args:
        path: the file or folder.
        opened: opens it, makes it if it is missing, and returns a descriptor.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the path cannot be opened, or its file system has no locks.
    """
    while True:
        descriptor = opened(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner has just renamed or removed it

"""Regular files of a limited size: all that this package reads from the disk is opened here.

A pipe would block, a device has no end, and a link may lead to either. Every failure is an OSError whose `strerror` is
the reason in words, so that all callers report it in one way.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from io import BufferedReader
from pathlib import Path

SMALL_BYTES = 2**24
"""Limit of configs, indexes, chat templates, schemas, options and prompts. The largest of them, the index of weights,
has 0.1 MB for a model of 14B; a prompt that fills 128K tokens has 0.5 MB."""

TOKENIZER_BYTES = 2**27
"""Limit of tokenizer files. The one of o200k, a vocabulary of 200,000, has 16 MB."""

# Descriptors that the shell has opened: standard input, and <(command).
_OPENED = re.compile(r"/dev/stdin|/dev/fd/[0-9]+|/proc/self/fd/[0-9]+")

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


def open_regular(path: Path, opened: bool = False) -> BufferedReader:
    """Opens a file for reading, and never waits for a writer.

    Args:
        path: the file; links are followed.
        opened: also takes a pipe that the shell has opened, `/dev/stdin` or `<(command)`, for a file the user named.

    Returns:
        The file, in binary.

    Raises:
        OSError: it does not exist, is not a regular file, or may not be read.
    """
    given = opened and _OPENED.fullmatch(str(path)) is not None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if given else os.O_NONBLOCK))
    except ValueError:
        raise OSError(errno.EINVAL, "its name has a NUL") from None
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise OSError(errno.EINVAL, "it is a socket, not a regular file", str(path)) from None
        raise
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFREG or (given and kind == stat.S_IFIFO):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'something else')}, not a regular file", str(path))


def read_regular(path: Path, most: int = SMALL_BYTES, opened: bool = False) -> bytes:
    """Reads a whole file.

    Args:
        path: the file; links are followed.
        most: the most bytes that it may have.
        opened: as for `open_regular`.

    Raises:
        OSError: as for `open_regular`; or the file is larger, or changed while it was read.
    """
    with open_regular(path, opened) as file:
        status = os.fstat(file.fileno())
        size = status.st_size if stat.S_ISREG(status.st_mode) else None  # a pipe has none
        data = b"" if size is not None and size > most else file.read((most if size is None else size) + 1)
        if max(size or 0, len(data)) > most:
            raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes, the limit for such a file", str(path))
        if size not in (None, len(data)):
            raise OSError(errno.EAGAIN, "it changed while it was read; try again", str(path))
    return data

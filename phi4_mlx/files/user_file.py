"""A file that the user named, read with one-line errors."""

from __future__ import annotations

from pathlib import Path

from phi4_mlx.errors import RequestError
from phi4_mlx.files.regular_file import SMALL_BYTES, read_regular


def read_file(path: Path, most: int = SMALL_BYTES) -> bytes:
    """Reads a file that the user named: a regular file, or a pipe that the shell has opened.

    Args:
        path: the file; `/dev/stdin` and the shell's `<(command)` are read too.
        most: the most bytes that it may have.

    Raises:
        RequestError: the file cannot be read, or is larger.
    """
    try:
        return read_regular(path, most, opened=True)
    except OSError as error:
        raise RequestError(f"{path!s:.300} cannot be read: {error.strerror}") from None

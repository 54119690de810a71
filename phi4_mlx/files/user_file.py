"""A file that the user named, read with one-line errors."""

from __future__ import annotations

from pathlib import Path

from phi4_mlx.errors import RequestError


def read_file(path: Path) -> bytes:
    """Reads a file that the user named.

    Raises:
        RequestError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in its name
        raise RequestError(f"{str(path)!r} cannot be read: {error}") from None

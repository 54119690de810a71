"""Files of lines that only grow: each line is on the disk before it counts, and a torn last line is dropped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from phi4_mlx.errors import RequestError
from phi4_mlx.files.lock import lock
from phi4_mlx.files.regular_file import open_regular


class LineFile:
    """A file of lines; one process at a time has it open.

    Args:
        path: the file; it and its folder are made.
        user: who else may have it open, for messages, such as "evaluation".
        option: the option that names another place, for messages.

    Raises:
        RequestError: another process has the file open, or it cannot be written.
    """

    def __init__(self, path: Path, user: str, option: str) -> None:
        self.path, self._option = path, option
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = lock(path, _open)
        except BlockingIOError:
            raise RequestError(
                f"{path} is in use by another {user}; wait until it ends, or name another {option}"
            ) from None
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}; name another {option}") from None

    def __enter__(self) -> LineFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file).st_size

    def begins_with(self, start: bytes) -> bool:
        """True if these bytes begin the file, or the file is shorter and begins them."""
        return start.startswith(os.pread(self._file, len(start), 0))

    def lines(self) -> Iterator[bytes]:
        """The whole lines, with their ends; cuts off a last line that was not written whole."""
        whole = 0
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                yield line
        self.cut(whole)

    def append(self, lines: bytes) -> None:
        """Writes whole lines; they are on the disk when this returns.

        Raises:
            RequestError: the disk is full, or fails; the lines before are kept.
        """
        data, before = memoryview(lines), self.nbytes
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise RequestError(
                f"{self.path} cannot be written: {error.strerror}; the answers before are kept, so make room and "
                "start again"
            ) from None

    def cut(self, nbytes: int) -> None:
        """Drops what follows the first bytes."""
        os.ftruncate(self._file, nbytes)

    def close(self) -> None:
        """Closes the file, so that another process may open it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _open(path: Path) -> int:
    if os.path.lexists(path):
        open_regular(path).close()  # a pipe would block
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)

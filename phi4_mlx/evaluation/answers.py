"""The answers of a task on the disk: each is written before the next question is asked, and no question twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from phi4_mlx.errors import RequestError
from phi4_mlx.files.lock import lock
from phi4_mlx.files.regular_file import open_regular


def key_of(fingerprint: str, kind: str, question: object, settings: object = None) -> str:
    """The key of an answer: SHA-256 of canonical JSON, 64 hexadecimal digits.

    Args:
        fingerprint: of the subject.
        kind: of the question, such as "score".
        question: ids or messages, as JSON.
        settings: everything else that the answer depends on, as JSON.
    """
    value = [fingerprint, kind, question, settings]
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Answers:
    """A file of JSON lines {"key", "value"} that only grows; one process at a time may have it open.

    Args:
        path: the file; its folder is made. A last line that was not written whole is dropped.
        others: files of other processes, from which answers are read too.

    Raises:
        RequestError: another process has the file open, or it is damaged or cannot be written.
    """

    def __init__(self, path: str | Path, others: Iterable[Path] = ()) -> None:
        self.path = Path(path)
        self._values: dict[str, Any] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = lock(self.path, _open)
        except BlockingIOError:
            raise RequestError(
                f"{self.path} is in use by another evaluation; wait until it ends, or name another --output-dir"
            ) from None
        except OSError as error:
            raise RequestError(f"{self.path} cannot be written: {error.strerror}; name another --output-dir") from None
        try:
            self._read(others)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._values)

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, key: str) -> Any | None:
        """The answer under a key; None if the question has not been answered."""
        return self._values.get(key)

    def put(self, key: str, value: object) -> None:
        """Writes an answer; it is on the disk when this returns.

        Raises:
            RequestError: the disk is full, or fails.
        """
        self.put_all({key: value})

    def put_all(self, answers: Mapping[str, object]) -> None:
        """Writes answers that were found together; all are on the disk when this returns.

        Raises:
            RequestError: the disk is full, or fails.
        """
        lines = "".join(
            json.dumps({"key": key, "value": value}, ensure_ascii=False, separators=(",", ":")) + "\n"
            for key, value in answers.items()
        )
        data = memoryview(lines.encode("utf-8", "backslashreplace"))
        before = os.fstat(self._file).st_size
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
        self._values |= answers

    def close(self) -> None:
        """Closes the file, so that another process may open it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _read(self, others: Iterable[Path]) -> None:
        """Reads the files, and cuts off a last line of the own one that is not whole."""
        for other in others:
            with open_regular(other) as file:
                self._take(file, other)
        with open(self._file, "rb", closefd=False) as file:
            whole = self._take(file, self.path)
        os.ftruncate(self._file, whole)
        os.lseek(self._file, 0, os.SEEK_END)

    def _take(self, file: BinaryIO, path: Path) -> int:
        """Takes the answers of a file; returns the bytes of its whole lines."""
        whole = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise RequestError(
                    f"{path}: line {number} is not an answer; remove that line, or name another --output-dir"
                ) from None
            whole += len(line)
        return whole


def _open(path: Path) -> int:
    if os.path.lexists(path):
        open_regular(path).close()  # a pipe would block
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)

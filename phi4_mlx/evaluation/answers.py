"""The answers of a task on the disk: each is written before the next question is asked, and no question twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.line_file import LineFile
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
        self._file = LineFile(self.path, "evaluation", "--output-dir")
        try:
            for other in others:
                with open_regular(other) as file:
                    self._take(takewhile(lambda line: line.endswith(b"\n"), file), other)
            self._take(self._file.lines(), self.path)
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
        self._file.append(lines.encode("utf-8", "backslashreplace"))
        self._values |= answers

    def close(self) -> None:
        """Closes the file, so that another process may open it."""
        self._file.close()

    def _take(self, lines: Iterable[bytes], path: Path) -> None:
        """Takes the answers of a file."""
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise RequestError(
                    f"{path}: line {number} is not an answer; remove that line, or name another --output-dir"
                ) from None

"""The file of answers, in the order of the prompts, and beside it what the run is and the answers that wait.

An answer that comes before those of earlier prompts waits in FILE.run until they are written. The first line of
FILE.run says what the answers depend on, so that no other run goes on with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.files.line_file import LineFile

About = Mapping[str, JsonObject]
"""What the answers depend on, by the name that a message gives it: {"is": compared, "shown": in messages}."""


class AnswerFile:
    """The answers of a run; each is on the disk when `put` returns.

    Args:
        path: the file of answers; a run that was stopped goes on.
        total: the number of prompts.
        about: what the answers depend on.

    Attributes:
        done: the number of answers.

    Raises:
        RequestError: the file has answers of another run, or of none; another run has it open; or it cannot be written.
    """

    def __init__(self, path: Path, total: int, about: About) -> None:
        self.path, self.total = path, total
        self._next = 0  # prompts whose answers are in the file
        self._waiting: dict[int, bytes] = {}
        self._answers = LineFile(path, "run", "--output")
        try:
            self._journal = LineFile(path.with_name(f"{path.name}.run"), "run", "--output")
            try:
                self._begin(about)
            except BaseException:
                self._journal.close()
                raise
        except BaseException:
            self._answers.close()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()
        self._answers.close()

    @property
    def done(self) -> int:
        """The number of answers."""
        return self._next + len(self._waiting)

    def missing(self) -> list[int]:
        """The prompts without an answer, from 0."""
        return [index for index in range(self._next, self.total) if index not in self._waiting]

    def put(self, index: int, answer: JsonObject) -> None:
        """Writes the answer of a prompt.

        Args:
            index: of the prompt, from 0; it has no answer yet.
            answer: the line.

        Raises:
            RequestError: the disk is full, or fails; the answers before are kept.
        """
        line = _line(answer)
        if index != self._next:
            self._journal.append(_line({"index": index, "answer": answer}))
            self._waiting[index] = line
            return
        self._write([line])
        if not self._waiting:
            self._journal.cut(self._head)

    def _write(self, ready: list[bytes]) -> None:
        """Writes the next answers, and those that waited for them."""
        following = self._next + len(ready)
        while following in self._waiting:
            ready.append(self._waiting[following])
            following += 1
        self._answers.append(b"".join(ready))
        for index in range(self._next, following):
            self._waiting.pop(index, None)
        self._next = following

    def _begin(self, about: About) -> None:
        """Goes on with the run that is there, or begins one."""
        head = json.loads(json.dumps(about))
        if not self._journal.begins_with(f'{{"{next(iter(about))}":'.encode()):
            raise self._damaged(1)  # before reading cuts off its last line: it may be somebody's file
        lines = list(self._journal.lines())
        written = self._read_answers(known=bool(lines))
        before = self._read_head(lines[0]) if lines else None
        waiting = {index: line for index, line in map(self._read_waiting, lines[1:]) if index >= written}
        if before is not None and (written or waiting):
            self._refuse_another(before, head)
        else:
            self._journal.cut(0)
            self._journal.append(_line(head))
            lines = [_line(head)]
        self._head = len(lines[0])
        self._next, self._waiting = written, waiting
        if self._next in self._waiting:
            self._write([])

    def _read_answers(self, known: bool) -> int:
        """The number of answers in the file, each known to be that of its prompt."""
        count = 0
        if not known and self._answers.nbytes:
            raise RequestError(
                f"{self.path} exists, and no run of --prompts wrote it; remove it, or name another --output"
            )
        for count, line in enumerate(self._answers.lines(), 1):
            try:
                number = json.loads(line)["line"]
            except (ValueError, KeyError, TypeError, RecursionError):
                number = None
            if number != count or count > self.total:
                raise RequestError(
                    f"{self.path}: line {count} is not the answer of prompt {count}; remove the file, or name another "
                    "--output"
                )
        return count

    def _read_head(self, line: bytes) -> dict[str, Any]:
        try:
            head = json.loads(line)
            return {name: {"is": each["is"], "shown": str(each["shown"])} for name, each in head.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._damaged(1) from None

    def _read_waiting(self, line: bytes) -> tuple[int, bytes]:
        try:
            entry = json.loads(line)
            return int(entry["index"]), _line(entry["answer"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._damaged() from None

    def _damaged(self, number: int | None = None) -> RequestError:
        where = "" if number is None else f" in line {number}"
        return RequestError(
            f"{self._journal.path} is damaged{where}; remove it and {self.path}, or name another --output"
        )

    def _refuse_another(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in {**now, **before}:
            then, new = (each.get(name, {"is": None, "shown": "none"}) for each in (before, now))
            if then["is"] != new["is"]:
                differs = f"{name} {then['shown']}, not {new['shown']}"
                if then["shown"] == new["shown"]:
                    differs = f"another {name} of the same name, {new['shown']}"
                raise RequestError(
                    f"{self.path} has answers of a run with {differs}; name another --output, or remove it and "
                    f"{self._journal.path.name}"
                )


def _line(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"

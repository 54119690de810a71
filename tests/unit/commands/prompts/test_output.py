"""The file of answers: in order, each once, on the disk; torn writes; answers of another run."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.commands.prompts.output import AnswerFile
from phi4_mlx.errors import RequestError


class Killed(BaseException):
    """Ends a run as `kill -9` does: nothing that would follow is done."""


def about(**changes: Any) -> dict[str, dict[str, Any]]:
    return {
        f"--{name}": {"is": value, "shown": str(value)} for name, value in ({"model": "m", "temp": 0} | changes).items()
    }


def answer(index: int) -> dict[str, Any]:
    return {"line": index + 1, "text": f"Zürich {index}\n\u2028" + "x" * index}


def numbers(path: Path) -> list[int]:
    """The numbers of the whole lines."""
    return [json.loads(line)["line"] for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def test_answers_in_any_order_stand_in_that_of_the_prompts(tmp_path: Path) -> None:
    path, order = tmp_path / "new" / "out.jsonl", [*range(30)]
    random.Random(3).shuffle(order)
    with AnswerFile(path, 30, about()) as file:
        for count, index in enumerate(order):
            assert file.done == count and len(file.missing()) == 30 - count
            file.put(index, answer(index))
            assert numbers(path) == [*range(1, len(numbers(path)) + 1)]
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == [answer(index) for index in range(30)]
    assert len((tmp_path / "new" / "out.jsonl.run").read_bytes().splitlines()) == 1  # no answer is kept twice
    with AnswerFile(path, 30, about()) as file:
        assert (file.done, file.missing()) == (30, [])


def test_a_run_killed_at_every_moment_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, order = tmp_path / "out.jsonl", [3, 0, 1, 5, 4, 2, 7, 6]
    left, write, sync = 0, os.write, os.fsync

    def pass_moment() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    def slow_write(descriptor: int, data: Any) -> int:
        pass_moment()
        done = write(descriptor, data[: len(data) // 2])
        pass_moment()
        return done + write(descriptor, data[done:])

    def slow_sync(descriptor: int) -> None:
        pass_moment()
        sync(descriptor)
        pass_moment()

    monkeypatch.setattr(os, "write", slow_write)
    monkeypatch.setattr(os, "fsync", slow_sync)
    drawn = []
    for moment in [*range(1, 13)] * 3 + [0]:
        left = moment
        try:
            with AnswerFile(path, len(order), about()) as file:
                kept = set(range(len(order))) - set(file.missing())
                assert kept >= set(drawn)
                for index in [each for each in order if each not in kept]:
                    file.put(index, answer(index))
                    drawn.append(index)
        except Killed:
            continue
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == [answer(index) for index in range(8)]
    assert len({*drawn}) == len(drawn)


def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, 2, about()) as file:
        file.put(0, answer(0))
        file.put(1, answer(1))
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:length])
        with AnswerFile(path, 2, about()) as file:
            assert file.missing() == [1]
            file.put(1, answer(1))
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"temp": 0.7},
            "has answers of a run with --temp 0, not 0.7; name another --output, or remove it and out.jsonl.run",
        ),
        ({"model": "n"}, "--model m, not n"),
        ({"seed": 3}, "--seed none, not 3"),
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_another_run_is_refused_by_what_differs(tmp_path: Path, index: int, changes: dict[str, Any], line: str) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, 2, about()) as file:
        file.put(index, answer(index))
    before = path.read_bytes()
    for _ in range(2):  # it is not left locked
        with pytest.raises(RequestError, match=line):
            AnswerFile(path, 2, about(**changes))
    assert path.read_bytes() == before


def test_another_model_of_the_same_name_is_told(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "out", 2, {"--model": {"is": 1, "shown": "m"}}) as file:
        file.put(0, answer(0))
    with pytest.raises(RequestError, match="another --model of the same name, m;"):
        AnswerFile(tmp_path / "out", 2, {"--model": {"is": 2, "shown": "m"}})


def test_a_run_without_answers_makes_room_for_another(tmp_path: Path) -> None:
    AnswerFile(tmp_path / "out", 2, about()).__exit__(None, None, None)
    with AnswerFile(tmp_path / "out", 2, about(temp=1)) as file:
        file.put(0, answer(0))
    with pytest.raises(RequestError, match="--temp 1, not 0"):
        AnswerFile(tmp_path / "out", 2, about())


def test_a_file_that_is_not_of_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("my notes\n")
    with pytest.raises(RequestError, match="no run of --prompts wrote it; remove it, or name another --output"):
        AnswerFile(tmp_path / "out", 2, about())
    assert (tmp_path / "out").read_text() == "my notes\n"


def test_somebodys_file_in_place_of_the_journal_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out.run").write_text("#!/bin/sh\necho no end of line")
    with pytest.raises(RequestError, match=r"out\.run is damaged in line 1; remove it and .*--output"):
        AnswerFile(tmp_path / "out", 2, about())
    assert (tmp_path / "out.run").read_text() == "#!/bin/sh\necho no end of line"


@pytest.mark.parametrize(
    "damage", ["{}\n", "[]\n", "text\n", "\n", '{"line": 1}\n', '{"line": 4}\n', "[" * 10**5 + "\n"]
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "out"
    with AnswerFile(path, 3, about()) as file:
        file.put(0, answer(0))
        file.put(2, answer(2))
    whole, journal = path.read_text(), tmp_path / "out.run"
    path.write_text(whole + damage)
    with pytest.raises(RequestError, match="line 2 is not the answer of prompt 2"):
        AnswerFile(path, 3, about())
    path.write_text(whole)
    head, waiting, _ = journal.read_text().split("\n")
    for lines in (damage + waiting + "\n", head + "\n" + damage):
        journal.write_text(lines)
        with pytest.raises(RequestError, match=r"out.run is damaged|with --model none, not m"):
            AnswerFile(path, 3, about())


def test_one_run_writes(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "out", 2, about()), pytest.raises(RequestError, match="in use by another run"):
        AnswerFile(tmp_path / "out", 2, about())


@pytest.mark.parametrize("path", ["", "file/out", "pipe", "link"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(RequestError, match="cannot be written"):
        AnswerFile(tmp_path / path, 2, about())

"""Answers on the disk: what is written stays, a torn line is dropped, and one process writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.answers import Answers, key_of


def test_answers_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    values = {"a": {"x": [1.5, None, True]}, "b": "Zürich\n\u2028 \ud800", "c": -1e-300}
    with Answers(path) as answers:
        assert answers.get("a") is None
        answers.put("a", values["a"])
        answers.put_all({"b": values["b"], "c": values["c"]})
        assert answers.get("b") == values["b"]
    with Answers(path) as answers:
        assert {key: answers.get(key) for key in values} == values
        assert len(answers) == 3
    assert len(path.read_bytes().split(b"\n")) == 4


def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Answers(path) as answers:
        answers.put_all({"a": "first", "b": "zweite Antwort: ä"})
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for length in range(second, len(whole)):
        path.write_bytes(whole[:length])
        with Answers(path) as answers:
            assert (answers.get("a"), answers.get("b")) == ("first", None)
            answers.put("b", "again")
        assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == ["first", "again"]


@pytest.mark.parametrize("damage", [b"{}\n", b"[]\n", b"\x00\x00\n", b'{"key": "a"}\n', b"\n", b"[" * 10**5 + b"\n"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"key":"a","value":1}\n' + damage + b'{"key":"b","value":1}\n')
    with pytest.raises(RequestError, match="line 2 "):
        Answers(path)
    with pytest.raises(RequestError, match="line 2 "):  # it is not left locked
        Answers(path)


def test_one_process_writes(tmp_path: Path) -> None:
    with Answers(tmp_path / "answers"), pytest.raises(RequestError, match="in use by another evaluation"):
        Answers(tmp_path / "answers")
    Answers(tmp_path / "answers").close()


@pytest.mark.parametrize("path", ["", "file/answers", "pipe", "link"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(RequestError, match="cannot be written"):
        Answers(tmp_path / path)


def test_a_disk_that_fills_up_keeps_the_answers_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers"
    write, room = os.write, 60

    def small(descriptor: int, data: Any) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        done = write(descriptor, bytes(data)[:room])
        room -= done
        return done

    with Answers(path) as answers:
        monkeypatch.setattr(os, "write", small)
        answers.put("a", "first")
        with pytest.raises(RequestError, match="No space left"):
            answers.put("b", "x" * 100)
        assert answers.get("b") is None
        room = 10**6
        answers.put("c", "third")
    with Answers(path) as answers:
        assert [answers.get(key) for key in "abc"] == ["first", None, "third"]


def test_each_answer_is_on_the_disk_before_put_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    with Answers(tmp_path / "answers") as answers:
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((tmp_path / "answers").read_bytes()))
        answers.put("a", 1)
        answers.put("b", 2)
    assert [data.count(b"\n") for data in synced] == [1, 2]


def test_a_key_tells_everything_apart_that_an_answer_depends_on() -> None:
    keys = [
        key_of("f", "score", [[1], [2]]),
        key_of("g", "score", [[1], [2]]),
        key_of("f", "answer", [[1], [2]]),
        key_of("f", "score", [[1, 2], []]),
        key_of("f", "score", [[1], [2]], {"temp": 1.0}),
    ]
    assert len({*keys}) == len(keys)
    assert key_of("f", "k", {"a": 1, "b": 2}) == key_of("f", "k", {"b": 2, "a": 1})

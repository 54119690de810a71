"""Parquet: rows like lines, in one or several files, and a clear message without the library."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phi4_mlx import load
from phi4_mlx.data import parquet
from phi4_mlx.data.jsonl import find_split
from phi4_mlx.data.parquet import read_rows, shards
from phi4_mlx.data.samples import load_samples
from phi4_mlx.errors import RequestError

CHAT = [
    {"role": "user", "content": "hi", "tool_calls": None},
    {"role": "assistant", "content": "hello", "tool_calls": None},
]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    """A stand-in for pyarrow: the files are empty, and the rows of each are given here."""
    rows: dict[str, list[dict[str, Any]]] = {}

    class Broken(Exception):
        pass

    class ParquetFile:
        def __init__(self, path: Path):
            if path.read_bytes() == b"broken":
                raise Broken("no magic\nbytes")
            self._rows = rows[path.name]

        def iter_batches(self) -> Any:
            return (SimpleNamespace(to_pylist=lambda row=row: [row]) for row in self._rows)

    monkeypatch.setattr(parquet, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(ArrowException=Broken))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", SimpleNamespace(ParquetFile=ParquetFile))
    return rows


def write(folder: Path, rows: dict[str, list[dict[str, Any]]], **content: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in content.items():
        file = name.replace("__", "-") + ".parquet"
        (folder / file).touch()
        rows[file] = each


def test_all_files_of_a_split_are_one(tmp_path: Path, files: dict[str, Any]) -> None:
    write(tmp_path / "data", files, train__00000__of__00002=[{"n": 1, "gap": None}, {"n": 2}], other=[{"n": 9}])
    write(tmp_path / "data", files, train__00001__of__00002=[{"n": 3, "deep": [{"a": None, "b": 0}]}])
    path = find_split(tmp_path)
    assert path == tmp_path / "data" / "train-00000-of-00002.parquet" and find_split(tmp_path, "valid") is None
    assert read_rows(path, lambda row, name: (row, name)) == [
        ({"n": 1}, "train-00000-of-00002.parquet:1"), ({"n": 2}, "train-00000-of-00002.parquet:2"),
        ({"n": 3, "deep": [{"b": 0}]}, "train-00001-of-00002.parquet:1"),
    ]  # fmt: skip
    write(tmp_path / "default" / "validation", files, **{"0000": [{"n": 4}], "0001": [{"n": 5}]})
    valid = find_split(tmp_path, "valid")
    assert valid is not None and read_rows(valid, lambda row, name: row["n"]) == [4, 5]
    assert shards(tmp_path, "test") == []


def test_jsonl_comes_first(tmp_path: Path, files: dict[str, Any]) -> None:
    write(tmp_path, files, train=[{"n": 1}])
    assert find_split(tmp_path) == tmp_path / "train.parquet"
    (tmp_path / "train.jsonl").touch()
    assert find_split(tmp_path) == tmp_path / "train.jsonl"


def test_samples_are_made_of_rows(tmp_path: Path, files: dict[str, Any]) -> None:
    _, tokenizer = load("demo", lazy=True)
    write(tmp_path, files, train=[{"messages": CHAT, "text": None}, {"messages": None, "text": "hi"}])
    samples, report = load_samples(tmp_path / "train.parquet", tokenizer)
    assert report.samples == 2 and samples[1].source == "train.parquet:2"
    assert len(samples[0].ids) > len(samples[1].ids)


def test_bad_rows_and_files_are_named(tmp_path: Path, files: dict[str, Any]) -> None:
    def refuse(row: dict[str, Any], name: str) -> None:
        raise RequestError(f"{row['n']} is no good")

    write(tmp_path, files, train=[{"n": n} for n in range(9)], test=[])
    told = r"train\.parquet:1: 0 is no good \(8 more bad rows: train\.parquet:2, .*\.\.\.\)$"
    with pytest.raises(RequestError, match=told):
        read_rows(tmp_path / "train.parquet", refuse)
    with pytest.raises(RequestError, match=r"test\.parquet is empty"):
        read_rows(tmp_path / "test.parquet", refuse)
    (tmp_path / "train.parquet").write_bytes(b"broken")
    with pytest.raises(RequestError, match=r"train\.parquet cannot be read: no magic bytes$"):
        read_rows(tmp_path / "train.parquet", refuse)


def test_without_the_library_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "find_spec", lambda name: None)
    (tmp_path / "train.parquet").touch()
    with pytest.raises(RequestError, match=r"train\.parquet is Parquet, which needs a library: pip install pyarrow"):
        read_rows(tmp_path / "train.parquet", lambda row, name: row)

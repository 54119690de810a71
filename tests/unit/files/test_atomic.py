"""A file or a folder is there whole or not at all, whatever fails on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.files import atomic
from phi4_mlx.files.atomic import replacing, sweep, whole_or_absent
from tests.packages import left_beside

OWN = re.compile(r"\.\d+-\d+(?=\.partial)")  # the part of a hidden name that tells writers apart
FULL = OSError(errno.ENOSPC, "No space left on device")


def write_file(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("new")


def write_folder(path: Path) -> None:
    with whole_or_absent(path) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_text("new")
        (partial / "b").write_text("new")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records what is flushed and renamed, by name."""
    done: list[str] = []

    def recorded(verb: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *rest: Any) -> Any:
            done.append(f"{verb} {OWN.sub('', path.name)}")
            return real(path, *rest)

        return call

    monkeypatch.setattr(atomic, "sync", recorded("flush", atomic.sync))
    monkeypatch.setattr(Path, "replace", recorded("rename", Path.replace))
    monkeypatch.setattr(Path, "rename", recorded("rename", Path.rename))
    return done


# --- a file ---


def test_a_file_is_flushed_then_renamed_then_its_folder_is_flushed(steps: list[str], tmp_path: Path) -> None:
    write_file(tmp_path / "x")
    assert steps == ["flush .x.partial", "rename .x.partial", f"flush {tmp_path.name}"]
    assert (tmp_path / "x").read_text() == "new"


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
def test_a_file_that_could_not_be_written_leaves_the_older_one(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(type(error)), replacing(tmp_path / "x") as partial:
        partial.write_text("half")
        raise error
    assert (tmp_path / "x").read_text() == "old"
    assert left_beside(tmp_path / "x") == ["x"]
    write_file(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "new"


def test_a_file_that_could_not_be_flushed_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise FULL

    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "old"
    assert left_beside(tmp_path / "x") == ["x"]


def test_two_writers_of_a_file_do_not_touch_each_other(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as first:
        first.write_text("first, half")
        with replacing(tmp_path / "x") as second:
            second.write_text("second")
        assert (tmp_path / "x").read_text() == "second"
        first.write_text("first, whole")
    assert (tmp_path / "x").read_text() == "first, whole"
    assert left_beside(tmp_path / "x") == ["x"]


def test_what_a_killed_run_left_of_a_file_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".x.999999999-0.partial").write_text("half of an older file")  # no process has this number
    with replacing(tmp_path / "x") as partial:
        assert not partial.exists()
        partial.write_text("new")
    assert left_beside(tmp_path / "x") == ["x"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_only_a_regular_file_is_replaced(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(RequestError, match="is not a regular file, so it is not replaced; name another file"):
        write_file(tmp_path / "x")
    assert left_beside(tmp_path / "x") == ["x"]


# --- a folder ---


def test_everything_in_a_folder_is_flushed_before_it_is_renamed(steps: list[str], tmp_path: Path) -> None:
    write_folder(tmp_path / "out")
    assert set(steps[:4]) == {"flush inner", "flush a", "flush b", "flush .out.partial"}
    assert steps[3:] == ["flush .out.partial", "rename .out.partial", f"flush {tmp_path.name}"]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_an_existing_target_is_refused(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(RequestError, match="already exists; remove it, or name another folder"):
        write_folder(tmp_path / "out")
    assert left_beside(tmp_path / "out") == ["out"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write_folder(tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "b").exists()


def test_what_a_killed_run_left_of_a_folder_is_cleared(tmp_path: Path) -> None:
    left, elsewhere = tmp_path / ".out.partial", tmp_path / "elsewhere"
    (left / "folder").mkdir(parents=True)
    (left / "model.safetensors").write_bytes(bytes(100))
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (left / "link").symlink_to(elsewhere)
    write_folder(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b", "inner"]
    assert left_beside(tmp_path / "out") == ["out"]
    assert (elsewhere / "precious").exists()


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / ".out.partial"
    other.mkdir()
    (other / "model.safetensors").touch()
    holder = os.open(other, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        with pytest.raises(RequestError, match=r"another process is writing .*; wait until it ends"):
            write_folder(tmp_path / "out")
    finally:
        os.close(holder)
    assert (other / "model.safetensors").exists()


def test_a_link_in_place_of_the_hidden_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(RequestError, match="cannot be written"):
        write_folder(tmp_path / "out")
    assert (tmp_path / "precious" / "file").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(
            RequestError, match=f"^{out} cannot be written: No space left on device; nothing was left there$"
        ),
        whole_or_absent(out) as partial,
    ):
        (partial / "a").write_text("half")
        raise FULL
    assert left_beside(out) == []


def test_sweeping_takes_the_files_of_killed_writers_alone(tmp_path: Path) -> None:
    dead, alive = 999_999_999, os.getpid()
    kept = [
        f".a.json.{alive}-0.partial", ".a.json.partial", ".a.json.x-0.partial", f".b.txt.{dead}-0.partial",
        f"a.json.{dead}-0.partial", f".a.json.{dead}-0", "a.json",
    ]  # fmt: skip
    gone = [f".a.json.{dead}-0.partial", f".b b.json.{dead}-17.partial", f".c.json.{10**18}-0.partial"]
    for name in [*kept, *gone]:
        (tmp_path / name).write_text("half")
    (tmp_path / f".d.json.{dead}-0.partial").mkdir()  # not ours
    sweep(tmp_path, "*.json")
    sweep(tmp_path / "missing", "*.json")
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([*kept, f".d.json.{dead}-0.partial"])

"""A list of checksums: what `sha256sum` writes and checks, and any change is found."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from phi4_mlx.errors import CheckpointError
from phi4_mlx.files.checksums import check_checksums, checksums, differing_file

NAMES = ("b.bin", "a.json")


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).write_bytes(name.encode() * 1000)
    (tmp_path / "list.sha256").write_text(checksums((name, tmp_path / name) for name in NAMES))
    return tmp_path / "list.sha256"


def test_files_that_match_are_taken(listed: Path) -> None:
    assert differing_file(listed, NAMES) is None
    check_checksums(listed, NAMES, "way")
    if program := shutil.which("sha256sum"):
        assert subprocess.run([program, "-c", listed.name], cwd=listed.parent, capture_output=True).returncode == 0


def test_a_changed_or_missing_file_is_named(listed: Path) -> None:
    (listed.parent / "a.json").write_bytes(b"other")
    assert differing_file(listed, NAMES) == "a.json"
    with pytest.raises(CheckpointError, match=r"a\.json is damaged or .*: list.sha256 has another SHA-256; way$"):
        check_checksums(listed, NAMES, "way")
    (listed.parent / "b.bin").unlink()
    assert differing_file(listed, NAMES) == "b.bin"
    check_checksums(listed, NAMES, "way")  # whoever reads it names it


CHANGES = [lambda data: b"", lambda data: data * 2, lambda data: data[:-1], bytes.upper, lambda data: b"\xff"]


@pytest.mark.parametrize("change", CHANGES)
def test_another_list_is_named_itself(listed: Path, change: object) -> None:
    listed.write_bytes(change(listed.read_bytes()))  # type: ignore[operator]
    assert differing_file(listed, NAMES) is not None
    with pytest.raises(CheckpointError, match=r"is damaged"):
        check_checksums(listed, NAMES, "way")


def test_without_a_list_nothing_is_checked(listed: Path) -> None:
    listed.unlink()
    check_checksums(listed, NAMES, "way")
    assert differing_file(listed, NAMES) == "list.sha256"

"""An unchanged package passes; every change to it is found and named."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.errors import CheckpointError
from phi4_mlx.files.manifest import MANIFEST_FILE, file_sha256, read_manifest, verify_manifest

FILES = {"config.json": b"{}", "model.safetensors": bytes(3_000_000), "tokenizer.json": b'{"a": 1}'}


def package(folder: Path) -> Path:
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    files = {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in FILES.items()}
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": files}))
    return folder


def test_a_whole_package_passes(tmp_path: Path) -> None:
    folder = package(tmp_path / "m")
    (folder / "README.md").write_text("not part of the package, and not read by loaders")
    verify_manifest(folder)
    assert read_manifest(folder)["files"].keys() == FILES.keys()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _outside(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


def _manifest(value: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / MANIFEST_FILE).write_text(value if isinstance(value, str) else json.dumps(value))


def _list_a_path(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["files"]["../m/config.json"] = manifest["files"]["config.json"]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / MANIFEST_FILE).unlink(), "cannot be verified"),
    "one bit": (lambda f: _flip(f / "model.safetensors"), "model.safetensors does not match its SHA-256"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 5), "has a size of 5, not 3,000,000 bytes"),
    "missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "one more": (lambda f: (f / "model-2.safetensors").write_bytes(b""), "is not in manifest.json"),
    "a link out of it": (_outside, "outside the folder"),
    "not JSON": (_manifest("{"), "not JSON"),
    "no files": (_manifest({}), "does not list files"),
    "no hash": (_manifest({"files": {"config.json": {"bytes": 2}}}), "does not list files"),
    "not a hash": (_manifest({"files": {"config.json": {"bytes": 2, "sha256": "x"}}}), "does not list files"),
    "a path": (_list_a_path, "is not the name of a file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_every_change_is_found_and_named(case: str, tmp_path: Path) -> None:
    damage, reason = DAMAGE[case]
    folder = package(tmp_path / "m")
    damage(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        verify_manifest(folder)
    assert "\n" not in str(caught.value)


def test_file_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1_000_000)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()

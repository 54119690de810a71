"""The vendored libraries are the bytes of their npm packages, each with its licence, small enough for the wire."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.page.vendor import PACKAGES, PAGE, TESTS

FOLDERS = [PAGE, TESTS]


def entries(folder: Path) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads((folder / "vendor.json").read_text())
    return listed


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda it: it.parent.name)
def test_each_file_has_the_hash_in_vendor_json_and_none_is_unlisted(folder: Path) -> None:
    listed: dict[str, str] = {}
    for entry in entries(folder):
        listed |= entry["files"] | entry["licences"]
    files = [it for it in folder.iterdir() if it.name != "vendor.json"]
    assert {it.name: hashlib.sha256(it.read_bytes()).hexdigest() for it in files} == listed


def test_vendor_json_says_what_the_script_would_fetch() -> None:
    written = [(it["name"], it["version"], it["licence"]) for folder in FOLDERS for it in entries(folder)]
    assert written == [(it.name, it.version, it.licence) for it in PACKAGES]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda it: it.parent.name)
def test_each_package_has_a_licence_and_an_integrity(folder: Path) -> None:
    for entry in entries(folder):
        assert entry["integrity"].startswith("sha512-") and entry["licences"]
        for name in entry["licences"]:
            assert "copyright" in (folder / name).read_text().lower()


def test_the_libraries_stay_within_their_share_of_the_wire() -> None:
    sizes = {it.name: len(gzip.compress(it.read_bytes(), 9)) for it in PAGE.glob("*.js")}
    assert sum(sizes.values()) <= 200_000, sizes


def test_no_library_needs_eval() -> None:
    """Each would be refused by `script-src 'self'`."""
    for file in PAGE.glob("*.js"):
        text = file.read_text()
        assert "eval(" not in text and "new Function" not in text, file.name

"""The manifest of a package: size and SHA-256 of every file but those for people, written by the converter.

`manifest.json` is an object. Its "files" maps a file's name to "bytes" and "sha256"; other entries are facts that the
converter has established about the package. The model card and the report of a calibration are not listed.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from phi4_mlx.errors import CheckpointError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.files.regular_file import open_regular
from phi4_mlx.files.safetensors import file_in, json_in

MANIFEST_FILE = "manifest.json"
REPORT_FILE = "quantization.json"  # of a calibration; it has times, so two equal packages may differ in it

_READ_BY_LOADERS = (".safetensors", ".json", ".jinja")
_BLOCK_BYTES = 2**20


def read_manifest(folder: Path) -> JsonObject:
    """Reads a package's manifest and checks its layout, not its hashes.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    manifest = json_in(folder, MANIFEST_FILE)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files or not all(map(_is_entry, files.values())):
        raise CheckpointError(f"{folder / MANIFEST_FILE} is damaged: it does not list files with their hashes")
    return manifest


def verify_manifest(folder: Path) -> None:
    """Checks every file of a package against its size and hash, and looks for unlisted files.

    Raises:
        CheckpointError: the manifest is missing; a file is missing or changed; a file that a loader would read is not
            listed.
    """
    if not os.path.lexists(folder / MANIFEST_FILE):
        raise CheckpointError(
            f"{folder} has no {MANIFEST_FILE}, so it cannot be verified; packages made by phi4_mlx.convert have one"
        )
    files = read_manifest(folder)["files"]
    paths = [path.relative_to(folder) for pattern in ("*", "*/*") for path in folder.glob(pattern)]
    present = {path.as_posix() for path in paths if path.suffix in _READ_BY_LOADERS}
    if stray := sorted(present - files.keys() - {MANIFEST_FILE, REPORT_FILE}):
        raise CheckpointError(f"{folder / stray[0]} is not in {MANIFEST_FILE}; remove it, or convert again")
    for name, entry in files.items():
        path = file_in(folder, name)
        size = path.stat().st_size
        if size != entry["bytes"]:
            sizes = f"a size of {size:,}, not {entry['bytes']:,} bytes"
            raise CheckpointError(f"{path} has {sizes}; download or convert it again")
        if file_sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} does not match its SHA-256; download or convert it again")


def file_sha256(path: Path, length: int | None = None) -> str:
    """The SHA-256 of a file's content, or of its first `length` bytes, in hexadecimal."""
    digest = hashlib.sha256()
    left = path.stat().st_size if length is None else length
    with open_regular(path) as file:
        while left > 0 and (block := file.read(min(left, _BLOCK_BYTES))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None
    )

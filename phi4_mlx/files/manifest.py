"""The hashes of a package's files: written by the converter, held against the folder when a user asks for it.

`manifest.json` is an object with "files", from a file's name to its "bytes" and "sha256", and what else the converter
found out about the package.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from phi4_mlx.errors import CheckpointError, ConfigError
from phi4_mlx.files.json_file import read_json
from phi4_mlx.files.safetensors import file_in

MANIFEST_FILE = "manifest.json"

_READ_BY_LOADERS = (".safetensors", ".json", ".jinja")
_BLOCK_BYTES = 2**20


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a package's manifest; checks its form, not yet its hashes.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        manifest = read_json(file_in(folder, MANIFEST_FILE))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    files = manifest.get("files")
    if not isinstance(files, dict) or not files or not all(map(_is_entry, files.values())):
        raise CheckpointError(f"{folder / MANIFEST_FILE} is damaged: it does not list files with their hashes")
    return manifest


def verify_manifest(folder: Path) -> None:
    """Holds every file of a package against its size and hash, and looks for files that do not belong there.

    Raises:
        CheckpointError: there is no manifest; a file is missing, changed, or not listed though a loader would read it.
    """
    if not (folder / MANIFEST_FILE).exists():
        raise CheckpointError(
            f"{folder} has no {MANIFEST_FILE}, so it cannot be verified; packages made by phi4_mlx.convert have one"
        )
    files = read_manifest(folder)["files"]
    present = {path.name for path in folder.iterdir() if path.suffix in _READ_BY_LOADERS}
    if stray := sorted(present - files.keys() - {MANIFEST_FILE}):
        raise CheckpointError(f"{folder / stray[0]} is not in {MANIFEST_FILE}; remove it, or convert again")
    for name, entry in files.items():
        path = file_in(folder, name)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path} has {size:,} bytes, not {entry['bytes']:,}; download or convert it again")
        if file_sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is not what its hash says; it was changed or damaged, get it anew")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None
    )

"""A file of SHA-256 checksums beside the files that it lists, in the format of `sha256sum`.

A single changed bit in a listed file, or in the list itself, is found. A folder without the list is not checked: files
from elsewhere have none, and whoever edits a file by hand removes the list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from phi4_mlx.errors import CheckpointError
from phi4_mlx.files.manifest import file_sha256
from phi4_mlx.files.regular_file import read_regular


def checksums(files: Iterable[tuple[str, Path]]) -> str:
    """The lines of the list.

    Args:
        files: (name in the list, place of the file).
    """
    return "".join(f"{file_sha256(path)}  {name}\n" for name, path in files)


def differing_file(list_file: Path, names: Iterable[str]) -> str | None:
    """The first file of a folder that does not match the folder's list; None if all match.

    Args:
        list_file: the list, beside the files.
        names: the files that it must list, in this order, and no others.

    Returns:
        The file's name, or that of the list, if it cannot be read or is not a list of these files.
    """
    try:
        found = read_regular(list_file).splitlines(keepends=True)
    except OSError:
        return list_file.name
    for name in names:
        try:
            expected = checksums([(name, list_file.with_name(name))]).encode()
        except OSError:
            return name
        if not found or found[0][64:] != expected[64:]:
            return list_file.name
        if found.pop(0) != expected:
            return name
    return list_file.name if found else None


def check_checksums(list_file: Path, names: Sequence[str], advice: str) -> None:
    """Checks files against the list beside them; does nothing without a list, and leaves missing files to their reader.

    Args:
        list_file: the list.
        names: the files that it must list, in this order.
        advice: the way out that ends the message.

    Raises:
        CheckpointError: a file, or the list, has changed.
    """
    differing = differing_file(list_file, names) if list_file.exists() else None
    if differing == list_file.name:
        raise CheckpointError(f"{list_file} is damaged, or is not the list of {' and '.join(names)}; {advice}")
    if differing is not None and (place := list_file.with_name(differing)).exists():
        raise CheckpointError(f"{place} is damaged or has been changed: {list_file.name} has another SHA-256; {advice}")

"""Parquet, as many datasets on the Hub are: read where the user has a library for it, and named where not.

A split may be several files, numbered like train-00000-of-00002.parquet. Their rows are samples, as the lines of a
JSONL file are, and have names like theirs: "train-00000-of-00002.parquet:12".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from phi4_mlx.errors import RequestError

_ENDS = (".parquet", "-*.parquet", "/*.parquet")
_NAMES = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}
_SHOWN = 5  # bad rows behind the first that are listed by name

Read = TypeVar("Read")


def is_parquet(path: Path) -> bool:
    """Whether a file is one, by its name."""
    return path.suffix == ".parquet"


def patterns(split: str) -> list[str]:
    """Where the files of a split may be in a dataset's repository."""
    return [f"{place}{name}{end}" for place in ("", "data/", "default/") for name in _NAMES[split] for end in _ENDS]


def shards(folder: Path, split: str) -> list[Path]:
    """The files of a split, in order; those of the first place that has any."""
    for pattern in patterns(split):
        if found := sorted(folder.glob(pattern)):
            return found
    return []


def read_rows(path: Path, read: Callable[[dict[str, Any], str], Read]) -> list[Read]:
    """What `read` makes of each row of a split.

    Args:
        path: its first file; those that are numbered after it belong to it.
        read: called with a row, its empty columns left out, and its name; raises RequestError for one it cannot use.

    Raises:
        RequestError: the library is not installed, a file cannot be read or there is no row, or rows are bad: the first
            is told with its reason, the others by name. All rows have then been looked at.
    """
    made: list[Read] = []
    bad: list[tuple[str, str]] = []
    for row, name in _rows(path):
        try:
            made.append(read(row, name))
        except RequestError as error:
            bad.append((name, str(error)))
    if bad:
        more = ", ".join(name for name, _ in bad[1 : _SHOWN + 1]) + (", ..." if len(bad) > _SHOWN + 1 else "")
        others = f" ({len(bad) - 1:,} more bad row{'s' if len(bad) > 2 else ''}: {more})" if more else ""
        raise RequestError(f"{path.parent / bad[0][0]}: {bad[0][1]}{others}")
    if not made:
        raise RequestError(f"{path} is empty; each row of it should be a sample")
    return made


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of all the files, from 1, a group at a time in memory."""
    if find_spec("pyarrow") is None:
        raise RequestError(f"{path} is Parquet, which needs a library: pip install pyarrow, or make it JSONL")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    stem, numbered, _ = path.name.partition("-00000-of-")
    pattern = f"{stem}-*-of-*.parquet" if numbered else "[0-9]*.parquet" if path.stem.isdigit() else path.name
    for file in sorted(path.parent.glob(pattern)):
        number = 0
        try:
            for batch in ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield _without_gaps(row), f"{file.name}:{number}"
        except (OSError, ArrowException) as error:
            raise RequestError(f"{file} cannot be read: {' '.join(str(error).split())}") from None


def _without_gaps(value: Any) -> Any:
    """The value without the keys that Parquet gives every row and that have nothing in this one."""
    if isinstance(value, list):
        return [_without_gaps(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_gaps(each) for key, each in value.items() if each is not None}
    return value

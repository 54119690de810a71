"""Parquet files, the format of many datasets on the Hub; reading them needs pyarrow.

A split may be several files, numbered like train-00000-of-00002.parquet. Each row is a sample, like a line of a JSONL
file, and is named like one: "train-00000-of-00002.parquet:12".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from phi4_mlx.errors import RequestError
from phi4_mlx.files.regular_file import open_regular
from phi4_mlx.terminal.amount import amount

_ENDS = (".parquet", "-*.parquet", "/*.parquet")
_NAMES = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}
_SHOWN = 5  # bad rows after the first that are listed by name

Read = TypeVar("Read")


def is_parquet(path: Path) -> bool:
    """True if the file's name ends in .parquet."""
    return path.suffix == ".parquet"


def patterns(split: str) -> list[str]:
    """Patterns of the files of a split in a dataset's repository."""
    return [f"{place}{name}{end}" for place in ("", "data/", "default/") for name in _NAMES[split] for end in _ENDS]


def shards(folder: Path, split: str) -> list[Path]:
    """The files of a split in order, found by the first pattern that matches any."""
    for pattern in patterns(split):
        if found := sorted(folder.glob(pattern)):
            return found
    return []


def read_rows(path: Path, read: Callable[[dict[str, Any], str], Read], rows: int | None = None) -> list[Read]:
    """Reads the rows of a split.

    Args:
        path: its first file; the files numbered after it belong to the split too.
        read: called with a row, without its empty columns, and its name; raises RequestError for a bad row.
        rows: the most rows to read; None for all.

    Returns:
        The return values of `read`, in order.

    Raises:
        RequestError: pyarrow is not installed, a file cannot be read, there is no row, or rows are bad; the message
            gives the reason of the first and the names of the others.
    """
    made: list[Read] = []
    bad: list[tuple[str, str]] = []
    for row, name in islice(_rows(path), rows):
        try:
            made.append(read(row, name))
        except RequestError as error:
            bad.append((name, str(error)))
    if bad:
        more = ", ".join(name for name, _ in bad[1 : _SHOWN + 1]) + (", ..." if len(bad) > _SHOWN + 1 else "")
        others = f" ({amount(len(bad) - 1, 'more bad row')}: {more})" if more else ""
        raise RequestError(f"{path.parent / bad[0][0]}: {bad[0][1]}{others}")
    if not made:
        raise RequestError(f"{path} is empty; each row of it must be a sample")
    return made


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of all files with their names; only one batch of rows is in memory at a time."""
    if find_spec("pyarrow") is None:
        raise RequestError(f"{path} is Parquet, which needs a library: pip install pyarrow, or convert it to JSONL")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    stem, numbered, _ = path.name.partition("-00000-of-")
    pattern = f"{stem}-*-of-*.parquet" if numbered else "[0-9]*.parquet" if path.stem.isdigit() else path.name
    for file in sorted(path.parent.glob(pattern)):
        number = 0
        try:
            open_regular(file).close()  # pyarrow would wait for a pipe
            for batch in ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield _without_gaps(row), f"{file.name}:{number}"
        except OSError as error:
            raise RequestError(f"{file} cannot be read: {' '.join((error.strerror or str(error)).split())}") from None
        except ArrowException as error:
            raise RequestError(f"{file} cannot be read: {' '.join(str(error).split())}") from None


def _without_gaps(value: Any) -> Any:
    """The value without the keys whose value is None; Parquet gives every row all keys."""
    if isinstance(value, list):
        return [_without_gaps(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_gaps(each) for key, each in value.items() if each is not None}
    return value

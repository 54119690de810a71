"""Files of samples, from a folder, by name or from the Hub, and the lines of JSONL.

Training takes hours, so every line is checked before it starts, and all bad lines are reported together.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from phi4_mlx.data.parquet import patterns, shards
from phi4_mlx.errors import RequestError
from phi4_mlx.files.regular_file import open_regular
from phi4_mlx.hub import why_not_downloaded
from phi4_mlx.terminal.amount import amount
from phi4_mlx.terminal.suggestion import path_suggestion

SPLITS = ("train", "valid", "test")
MAX_LINE_BYTES = 2**24  # 16 MiB, about forty times the size of 128K tokens

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.jsonl)")
_BLANK = b" \t\r\n"
_SHOWN = 5  # bad lines after the first that are listed by number

Read = TypeVar("Read")


def find_split(path_or_hf_id: str | Path, split: str = "train") -> Path | None:
    """Finds the file of a split.

    Args:
        path_or_hf_id: a folder with train.jsonl, and optionally valid.jsonl and test.jsonl; one file, which is the
            training split; or the id of a dataset on the Hub ("owner/name") with such files, or with Parquet.
        split: "train", "valid" or "test".

    Returns:
        The file; None if "valid" or "test" is missing.

    Raises:
        RequestError: nothing or no training split is there, or the Hub cannot be reached.
    """
    if split not in SPLITS:
        raise RequestError(f"split {split!r} is not known; known are {', '.join(SPLITS)}")
    path = Path(os.path.expanduser(path_or_hf_id))
    if path.exists() and not path.is_dir():
        return path if split == "train" else None
    if path.exists():
        found = next((place for place in (path / f"{split}.jsonl", *shards(path, split)) if place.exists()), None)
    else:
        found = _find_on_hub(str(path_or_hf_id), split)
    if found is None and split == "train":
        raise RequestError(
            f"{path_or_hf_id} holds no train.jsonl; each line of it is an object with text, prompt and completion, or "
            "messages"
        )
    return found


def read_lines(
    path: Path, read: Callable[[dict[str, Any], str], Read], lines: int | None = None, bare: str | None = None
) -> list[Read]:
    """Reads the lines of a file. Blank lines at its end are ignored.

    Args:
        path: the file.
        read: called with a line's object and its name ("train.jsonl:12"); raises RequestError for a bad line.
        lines: the most lines to read; None for all.
        bare: the key of a line that is a string in place of an object; None refuses it.

    Returns:
        The return values of `read`, in order.

    Raises:
        RequestError: the file cannot be read, holds no line, or has bad lines; the message gives the reason of the
            first and the numbers of the others.
    """
    made: list[Read] = []
    bad: list[tuple[int, str]] = []
    try:
        with open_regular(path, opened=True) as file:
            for number, line in islice(_numbered(file), lines):
                try:
                    made.append(read(_parsed(line, bare), f"{path.name}:{number}"))
                except RequestError as error:
                    bad.append((number, str(error)))
                except RecursionError:
                    bad.append((number, "has too many nested brackets"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    refuse_lines(path, bad)
    if not made:
        raise RequestError(f"{path} is empty; each line of it must be a {bare or 'sample'}")
    return made


def refuse_lines(path: Path, bad: Sequence[tuple[int, str]]) -> None:
    """Refuses a file with bad lines.

    Args:
        path: the file.
        bad: the number of each bad line and the reason.

    Raises:
        RequestError: there are any; gives the reason of the first and the numbers of the others.
    """
    if bad:
        raise RequestError(f"{path}:{bad[0][0]}: {bad[0][1]}{_others([number for number, _ in bad[1:]])}")


def _numbered(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, from 1; a line that is too long is cut one byte above the limit."""
    blank: list[int] = []
    for number in count(1):
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
        if not line.strip(_BLANK):
            blank.append(number)
            continue
        yield from ((n, b"") for n in blank)
        blank = []
        yield number, line.rstrip(b"\r\n")


def _parsed(line: bytes, bare: str | None) -> dict[str, Any]:
    if not line:
        raise RequestError("the line is empty")
    if len(line) > MAX_LINE_BYTES:
        raise RequestError(f"the line is longer than {MAX_LINE_BYTES:,} bytes; a sample is a few thousand tokens")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start}; convert it, for example with iconv"
        ) from None
    try:
        record = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise RequestError(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise RequestError(f"not JSON that can be read: {error}") from None
    if isinstance(record, str) and bare is not None:
        return {bare: record}
    if not isinstance(record, dict):
        raise RequestError(f'holds {record!r:.60}, not an object like {{"{bare or "text"}": "..."}}')
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RequestError(f"key {key!r:.60} occurs twice; each key must occur once")
        found[key] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"not JSON: {name} is not a JSON number")


def _others(numbers: list[int]) -> str:
    if not numbers:
        return ""
    shown = ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if len(numbers) > _SHOWN else "")
    return f" ({amount(len(numbers), 'more bad line')}: {shown})"


def _find_on_hub(name: str, split: str) -> Path | None:
    """The file of a split of a Hub dataset: JSONL if there is one, else the first Parquet file."""
    folder = _download(name, [f"{split}.jsonl", f"data/{split}.jsonl"])
    for place in (folder / f"{split}.jsonl", folder / "data" / f"{split}.jsonl"):
        if place.exists():
            return place
    folder = _download(name, patterns(split))
    return next(iter(shards(folder, split)), None)


def _download(name: str, files: list[str]) -> Path:
    """The folder with some files of a Hub dataset, from the cache or downloaded."""
    if not _HUB_ID.fullmatch(name):
        wrong = f"{name!r} is neither a folder, nor a file, nor the id of a Hub dataset like owner/name"
        raise RequestError(wrong + path_suggestion(name, os.path.exists))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=files))
    except Exception as error:  # the Hub library's HTTP client and its exceptions differ by version
        wrong = f"no such file or folder here, and the Hub dataset {name} {why_not_downloaded(error)}"
        raise RequestError(wrong + path_suggestion(name, os.path.exists)) from None

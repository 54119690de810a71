"""Safetensors files: a reader that checks every claim of a header, and a writer that streams.

A file is eight bytes with the length of the header, the header, and the numbers. The header is a JSON object:
tensor name -> dtype, shape, and the offsets of the first and last byte. Nothing here reads pickle, and no link leads a
reader out of a model's folder.

Source: the format's description in the `safetensors` README. All that the library accepts is accepted, except for
duplicate names and entries written as lists, which mlx cannot read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import CheckpointError, ConfigError
from phi4_mlx.files.dtypes import DTYPES
from phi4_mlx.files.json_file import JsonObject, is_deeper, read_json
from phi4_mlx.files.regular_file import SMALL_BYTES, open_regular, read_regular

if TYPE_CHECKING:
    from typing_extensions import Buffer

INDEX_FILE = "model.safetensors.index.json"
TOWERS_FILE = "towers.safetensors"  # of a package's towers for pictures and sound, beside the weights of the decoder

_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_MAX_NESTING = 127  # JSON levels, the library's own limit


@dataclass(frozen=True)
class TensorInfo:
    """The dtype, the shape and the place of a tensor in its file.

    Attributes:
        dtype: its name in the format, such as "BF16".
        shape: outermost dimension first.
        start: offset in the file of the first byte.
        end: offset in the file after the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        path: the file.
        name: its name there.
        info: its dtype, shape and place; the shape may lack trailing ones of the file's.
    """

    path: Path
    name: str
    info: TensorInfo


@dataclass(frozen=True)
class Header:
    """The header of a file, checked against the file's size.

    Attributes:
        tensors: name -> place in the file. Together they cover the file: no gap, no overlap, nothing after the last.
        metadata: free text by name.
        raw: the bytes before the numbers, unchanged.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    raw: bytes


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """The size of a tensor in bytes.

    Args:
        dtype: its name in the format, such as "BF16".
        shape: its dimensions.

    Raises:
        ValueError: the dtype is unknown, a dimension is not an integer from 0 to 2**64 - 1, or the size does not fit
            in 64 bits or is not a whole number of bytes.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype[:20]!r} is not one of {', '.join(DTYPES)}")
    bits = 1
    for size in (*shape, DTYPES[dtype].bits):
        if not _is_offset(size):
            raise ValueError(f"dimension {size!r} is not a whole number from 0 to 2**64 - 1")
        bits *= size
        if not _is_offset(bits):
            raise ValueError(f"shape {list(shape)} does not fit in 64 bits")
    if bits % 8:
        raise ValueError(f"shape {list(shape)} of {dtype} is not a whole number of bytes")
    return bits // 8


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file; see `read_whole_header`."""
    return read_whole_header(path).tensors


class _OtherFormat(Exception):
    """The file does not begin as a safetensors file does."""


def read_whole_header(
    path: Path, advice: str = "download or convert it again", kind: str = "safetensors file"
) -> Header:
    """Reads the header of a safetensors file and checks every claim against the file's size.

    Args:
        path: the file; a link is followed, see `file_in`.
        advice: the way out that ends the message about a damaged file.
        kind: the noun for such a file, in the message about a file of another format.

    Raises:
        CheckpointError: the file cannot be read, has another format, or a claim of its header is false.
    """
    try:
        raw, size = _read_raw(path)
        tensors = _parse(raw[8:])
        metadata = tensors.pop("__metadata__", None)  # free text, or null
        if metadata is not None and not (isinstance(metadata, dict) and all(type(v) is str for v in metadata.values())):
            raise ValueError("__metadata__ is not an object of strings")
        infos = {name: _check_entry(name, entry, len(raw)) for name, entry in tensors.items()}
        _check_cover(infos, len(raw), size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except _OtherFormat:
        raise CheckpointError(f"{path} is not a {kind}; {advice}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {str(error)[:300]}; {advice}") from None
    return Header(infos, metadata or {}, raw)


def weight_files(folder: Path) -> dict[str, Path]:
    """Finds the file of every tensor in a model's folder.

    Args:
        folder: holds the files that `model.safetensors.index.json` lists, or else `model*.safetensors`; and
            `towers.safetensors`, if the model has towers in a file of their own.

    Returns:
        Tensor name -> its file. Every header has been read and agrees with the index.

    Raises:
        CheckpointError: a file is missing, damaged, not in the index or leads out of the folder; a tensor is missing,
            not in the index, or in two files.
    """
    present = {path.name for path in folder.glob("model*.safetensors")}
    listed = _read_index(folder) if os.path.lexists(folder / INDEX_FILE) else None
    if listed is None and not present:
        pickle = " (*.bin files are pickle, which is never read)" if any(folder.glob("*.bin")) else ""
        ranks = " (rank*.safetensors are TensorRT-LLM's)" if any(folder.glob("rank*.safetensors")) else ""
        raise CheckpointError(
            f"{folder} holds no model*.safetensors{pickle}{ranks}; it is not a checkpoint, or an incomplete one"
        )
    if listed is not None and (stray := sorted(present - set(listed.values()))):
        raise CheckpointError(f"{folder / stray[0]} is not in {INDEX_FILE}; remove whichever of the two is stale")

    found: dict[str, Path] = {}
    towers = {TOWERS_FILE} if os.path.lexists(folder / TOWERS_FILE) else set()
    for name in sorted(towers.union(present if listed is None else listed.values())):
        path = file_in(folder, name)
        for tensor in read_header(path):
            if tensor in found:
                raise CheckpointError(f"{tensor} is in both {found[tensor].name} and {name} of {folder}; keep one")
            if listed is not None and listed.get(tensor) != name and name not in towers:
                raise CheckpointError(
                    f"{path} holds {tensor}, but {INDEX_FILE} does not list it there; get both from one source"
                )
            found[tensor] = path
    if listed is not None and (absent := sorted(listed.keys() - found.keys())):
        raise CheckpointError(
            f"{folder / listed[absent[0]]} lacks {absent[0]}, which {INDEX_FILE} lists there; download it again"
        )
    return found


def file_in(folder: Path, name: str) -> Path:
    """The path of a file in a folder, checked to be a regular file that no link leads out of the folder.

    Links from a snapshot of a Hugging Face cache to the cache's blobs are the only ones that may leave the folder.

    Args:
        folder: the folder.
        name: of the file; "name/name" for one in a folder of its own.

    Raises:
        CheckpointError: the file is missing, is not a regular file, or is outside the folder.
    """
    path = folder / name
    parts = name.split("/")
    if len(parts) > 2 or any(not part or part == ".." or Path(part).name != part or "\0" in part for part in parts):
        raise CheckpointError(f"{name!r} is not the name of a file in {folder}")
    try:
        home, target = folder.resolve(strict=True), path.resolve(strict=True)
        regular = stat.S_ISREG(target.stat().st_mode)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
        raise CheckpointError(
            f"{path} is missing; the checkpoint is incomplete, download or convert it again"
        ) from None
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise CheckpointError(f"{path} is a link to {target}, outside the folder; put the file itself there")
    if not regular:
        raise CheckpointError(f"{path} is not a regular file")
    return path


def json_in(folder: Path, name: str) -> JsonObject:
    """Reads a JSON object from a file in a folder.

    Raises:
        CheckpointError: as `file_in`, and if the file cannot be read or does not hold a JSON object.
    """
    try:
        return read_json(file_in(folder, name))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def bytes_in(folder: Path, name: str, most: int = SMALL_BYTES) -> bytes:
    """Reads a file in a folder.

    Raises:
        CheckpointError: as `file_in`, and if the file cannot be read or has more than `most` bytes.
    """
    path = file_in(folder, name)
    try:
        return read_regular(path, most)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def header_of(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The bytes before the numbers of a file that `TensorWriter` writes; its arguments are the same."""
    header: JsonObject = {"__metadata__": {"format": "mlx", **(metadata or {})}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the numbers begin at a multiple of 8
    return len(raw).to_bytes(8, "little") + raw


class TensorWriter:
    """Writes a safetensors file from beginning to end, piece by piece; its header is known from the start.

    As a context it closes itself. After an exception it leaves the file unfinished: write to a path from `replacing`
    or in a folder from `whole_or_absent`, which remove it then, and flush it to the disk otherwise.

    Attributes:
        header: the bytes before the numbers.
        sha256: SHA-256 of the whole file in hexadecimal, once it is closed.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None
    ):
        """Creates the file and writes its header.

        Args:
            path: must not exist yet.
            tensors: name -> (dtype, shape), in the order in which they will be written.
            metadata: free text by name, to be stored in the header.
        """
        sizes = ((name, tensor_bytes(*kind)) for name, kind in tensors.items())
        self._due = deque((name, size) for name, size in sizes if size)
        self._digest = hashlib.sha256()
        self._file = path.open("xb", buffering=0)
        self.header = header_of(tensors, metadata)
        self._put(memoryview(self.header))
        self.sha256 = ""

    def write(self, name: str, pieces: Iterable[Buffer]) -> None:
        """Appends a whole tensor.

        Args:
            name: the next tensor of the header.
            pieces: its bytes in order, in contiguous buffers of any size.
        """
        for piece in pieces:
            self.append(name, piece)
        missing = self._due[0][1] if self._due and self._due[0][0] == name else 0
        assert missing == 0, f"{name} does not have the size in its header: {missing} bytes are missing"

    def append(self, name: str, piece: Buffer) -> None:
        """Appends a piece of a tensor.

        Args:
            name: the tensor that is not complete yet, or else the next one of the header.
            piece: its next bytes, a contiguous buffer.
        """
        data = memoryview(piece)
        if data.nbytes == 0:
            return
        due, missing = self._due.popleft() if self._due else (None, 0)
        assert name == due, f"{name} is out of order: {due} comes next"
        missing -= data.nbytes
        assert missing >= 0, f"{name} does not have the size in its header: {-missing} bytes are too many"
        if missing:
            self._due.appendleft((name, missing))
        self._put(data.cast("B"))

    def close(self) -> None:
        """Closes the file, which must be complete."""
        assert not self._due, f"the file lacks {self._due[0][0]}"
        self._file.close()
        self.sha256 = self._digest.hexdigest()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._file.close()

    def _put(self, data: memoryview) -> None:
        self._digest.update(data)
        while data:  # a write may take less than it is given
            data = data[self._file.write(data) :]


def _read_raw(path: Path) -> tuple[bytes, int]:
    """The bytes before the numbers, and the size of the file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            if file.read(1) != b"{":
                raise _OtherFormat
            raise ValueError(f"its header claims {length:,} bytes, in a file of {size:,} (limit {_MAX_HEADER_BYTES:,})")
        header = file.read(length)
    if len(header) != length:
        raise ValueError("it shrank while it was read")
    return prefix + header, size


def _parse(raw: bytes) -> JsonObject:
    try:
        text = raw.decode("utf-8")
        header = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_real, parse_constant=_real
        )
        if re.search(r"\\u[dD][89a-fA-F]", text):  # an escaped half of a surrogate pair cannot be encoded again
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise ValueError(f"its header is a JSON {type(header).__name__}, not an object")
    return header


def _check_entry(name: str, entry: Any, base: int) -> TensorInfo:
    """A tensor's entry. Its offsets count from the header's end, `base`; the result's from the file's beginning."""
    if not isinstance(entry, dict) or is_deeper(entry, _MAX_NESTING - 1):
        raise ValueError(f"{name!r} is not described by an object of dtype, shape and data_offsets")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise ValueError(f"{name!r} lacks dtype, shape or data_offsets")
    if len(offsets) != 2 or not all(map(_is_offset, offsets)):
        raise ValueError(f"{name!r} has data_offsets {offsets!r:.100}")
    start, end = offsets
    try:
        size = tensor_bytes(dtype, shape)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    if size != end - start:
        raise ValueError(f"{name!r} claims the bytes from {start} to {end}, but {dtype} {shape} takes {size}")
    return TensorInfo(dtype, tuple(shape), base + start, base + end)


def _check_cover(infos: Mapping[str, TensorInfo], base: int, size: int) -> None:
    """Each tensor begins where another ends, and the last one ends with the file."""
    position = base
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start < position:
            raise ValueError(f"{name!r} overlaps the tensor before it")
        if info.start > position:
            raise ValueError(f"{name!r} leaves a gap before it, from byte {position:,} to {info.start:,}")
        position = info.end
    if position != size:
        raise ValueError(f"its tensors end at byte {position:,}, and the file at {size:,}")


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index."""
    listed = json_in(folder, INDEX_FILE).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map from tensors to files; download it again")
    return listed


def _is_offset(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**64  # not isinstance: a bool is an int


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _integer(text: str) -> int | float:
    """A JSON integer; one that does not fit in 64 bits unsigned becomes a float, which no size check accepts."""
    return int(text) if text.isdigit() and len(text) <= 20 else _real(text)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a number")
    return value

"""Safetensors on disk: headers proven before they are trusted, and a writer that streams.

A file is eight bytes with the length of the header, the header, and the numbers. The header is a JSON object:
a tensor's name -> its dtype, its shape, and where its numbers begin and end. Nothing here reads pickle, and no
link leads a reader out of a model's folder.

Source: the format's description in the `safetensors` README. What that library accepts is accepted, but for a name that
stands twice and for entries written as lists, which mlx cannot read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from phi4_mlx.errors import CheckpointError, ConfigError
from phi4_mlx.files.json_file import read_json

INDEX_FILE = "model.safetensors.index.json"
GET_ANEW = "download or convert it again"

_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_MAX_NESTING = 127  # of JSON within JSON, the library's own limit
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file.

    Attributes:
        dtype: the format's name of it, such as "BF16".
        shape: outermost dimension first.
        start: offset in the file of the first byte.
        end: offset in the file after the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself, once it has been held against the file's size.

    Attributes:
        tensors: name -> where it lies. They cover the file: no gap, no overlap, nothing after the last.
        metadata: free text by name.
        raw: the bytes before the numbers, as they stand there.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    raw: bytes


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """The size of a tensor in bytes.

    Raises:
        ValueError: the dtype is unknown, a dimension is no whole number of 64 bits, the size does not fit in
            64 bits, or it ends within a byte.
    """
    if dtype not in _DTYPE_BITS:
        raise ValueError(f"dtype {dtype[:20]!r} is not one of {', '.join(_DTYPE_BITS)}")
    bits = 1
    for size in (*shape, _DTYPE_BITS[dtype]):
        if not _is_offset(size):
            raise ValueError(f"dimension {size!r} is not a whole number from 0 to 2**64 - 1")
        bits *= size
        if not _is_offset(bits):
            raise ValueError(f"shape {list(shape)} does not fit in 64 bits")
    if bits % 8:
        raise ValueError(f"shape {list(shape)} of {dtype} ends within a byte")
    return bits // 8


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file; see `read_whole_header`."""
    return read_whole_header(path).tensors


def read_whole_header(path: Path) -> Header:
    """Reads what a safetensors file says it holds, and checks every claim against the file's size.

    Args:
        path: the file; a link is followed, see `file_in`.

    Raises:
        CheckpointError: the file cannot be read, or a claim of its header is false.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            _damaged(path, "it is not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                _damaged(
                    path,
                    f"its header claims {length:,} bytes, in a file of {size:,} (limit {_MAX_HEADER_BYTES:,})",
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if len(raw) != length:
        _damaged(path, "it shrank while it was read")
    header = _parse_header(path, raw)
    metadata = header.pop("__metadata__", None)  # free text, or null
    if metadata is not None and not (isinstance(metadata, dict) and all(type(v) is str for v in metadata.values())):
        _damaged(path, "__metadata__ is not an object of strings")
    infos = {name: _check_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_cover(path, infos, 8 + length, size)
    return Header(infos, metadata or {}, length.to_bytes(8, "little") + raw)


def weight_files(folder: Path) -> dict[str, Path]:
    """Finds the file of every tensor in a model's folder.

    Args:
        folder: holds the files that `model.safetensors.index.json` lists, or else `model*.safetensors`.

    Returns:
        Tensor name -> its file. Every header has been read, and agrees with the index.

    Raises:
        CheckpointError: a file is missing, damaged, not in the index or leads out of the folder; a tensor is missing,
            not in the index, or in two files.
    """
    present = {path.name for path in folder.glob("model*.safetensors")}
    listed = _read_index(folder) if os.path.lexists(folder / INDEX_FILE) else None
    if listed is None and not present:
        pickle = " (*.bin files are pickle, which is never read)" if any(folder.glob("*.bin")) else ""
        raise CheckpointError(
            f"{folder} holds no model*.safetensors{pickle}; it is no checkpoint, or only a part of one"
        )
    if listed is not None and (stray := sorted(present - set(listed.values()))):
        raise CheckpointError(f"{folder / stray[0]} is not in {INDEX_FILE}; remove whichever of the two is stale")

    found: dict[str, Path] = {}
    for name in sorted(present if listed is None else set(listed.values())):
        path = file_in(folder, name)
        for tensor in read_header(path):
            if tensor in found:
                raise CheckpointError(f"{tensor} is both in {found[tensor].name} and in {name} of {folder}; keep one")
            if listed is not None and listed.get(tensor) != name:
                raise CheckpointError(
                    f"{path} holds {tensor}, and {INDEX_FILE} does not say so; get both from one place"
                )
            found[tensor] = path
    if listed is not None and (absent := sorted(listed.keys() - found.keys())):
        raise CheckpointError(
            f"{folder / listed[absent[0]]} lacks {absent[0]}, which {INDEX_FILE} puts there; get it anew"
        )
    return found


def file_in(folder: Path, name: str) -> Path:
    """The file `name` of a folder, once it is known to be a regular file that no link takes elsewhere.

    The links of a Hugging Face cache, from a snapshot to its blobs, are the only ones that may leave the folder.

    Raises:
        CheckpointError: there is no such file, or it lies outside the folder.
    """
    path = folder / name
    if not name or Path(name).name != name or "\0" in name:
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


class TensorWriter:
    """Writes a safetensors file from beginning to end, while the tensors come in; its header is known from the start.

    As a context it closes itself; after an exception it leaves the file unfinished, for the caller to remove.

    Attributes:
        header: the bytes before the numbers.
        sha256: of the whole file, in hexadecimal, once it is closed.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None
    ):
        """Creates the file and writes its header.

        Args:
            path: must not exist yet.
            tensors: name -> (dtype, shape), in the order in which they will come.
            metadata: free text by name, to stand in the header too.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "mlx", **(metadata or {})}}
        end = 0
        for name, (dtype, shape) in tensors.items():
            start, end = end, end + tensor_bytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)  # the numbers begin at a multiple of 8
        self._pending = iter([(name, tensor_bytes(*kind)) for name, kind in tensors.items()])
        self._digest = hashlib.sha256()
        self._file = path.open("xb", buffering=0)
        self.header = len(raw).to_bytes(8, "little") + raw
        self._put(self.header)
        self.sha256 = ""

    def write(self, name: str, pieces: Iterable[Any]) -> None:
        """Appends a whole tensor.

        Args:
            name: the next one of the header.
            pieces: its bytes in order, in things with a contiguous buffer, as large or small as is handy.
        """
        expected, missing = next(self._pending, (None, 0))
        assert name == expected, f"{name} is out of order: {expected} comes next"
        for piece in pieces:
            missing -= self._put(piece)
        assert missing == 0, f"{name} is not of the size that its header says: {missing} bytes are missing"

    def close(self) -> None:
        """Puts the file on the disk, not only into the system's memory, and closes it."""
        missing = next(self._pending, None)
        assert missing is None, f"the file lacks {missing}"
        os.fsync(self._file.fileno())
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

    def _put(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        rest = view
        while rest:  # a write may take less than it was given
            rest = rest[self._file.write(rest) :]
        return len(view)


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
        header = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_real, parse_constant=_real
        )
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half a character in escapes cannot be encoded again
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        _damaged(path, f"its header is not JSON: {str(error)[:200]}")
    if not isinstance(header, dict):
        _damaged(path, f"its header is a JSON {type(header).__name__}, not an object")
    return header


def _check_entry(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    """A tensor's entry, its offsets counted from the file's beginning instead of the header's end, `base`."""
    if not isinstance(entry, dict) or _deeper(entry, _MAX_NESTING - 1):
        _damaged(path, f"{name!r} is not described by an object of dtype, shape and data_offsets")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        _damaged(path, f"{name!r} lacks dtype, shape or data_offsets")
    if len(offsets) != 2 or not all(map(_is_offset, offsets)):
        _damaged(path, f"{name!r} has data_offsets {offsets!r:.100}")
    start, end = offsets
    try:
        size = tensor_bytes(dtype, shape)
    except ValueError as error:
        _damaged(path, f"{name!r}: {error}")
    if size != end - start:
        _damaged(path, f"{name!r} claims the bytes from {start} to {end}, and {dtype} {shape} takes {size}")
    return TensorInfo(dtype, tuple(shape), base + start, base + end)


def _check_cover(path: Path, infos: Mapping[str, TensorInfo], base: int, size: int) -> None:
    """Each tensor begins where another ends, and the last one ends with the file."""
    position = base
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            flaw = (
                "overlaps the tensor before it"
                if info.start < position
                else f"leaves {info.start - position} bytes unused"
            )
            _damaged(path, f"{name!r} {flaw}")
        position = info.end
    if position != size:
        _damaged(path, f"its tensors end at byte {position:,}, and the file at {size:,}")


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index has it."""
    path = file_in(folder, INDEX_FILE)
    try:
        listed = read_json(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files; download it again")
    return listed


def _damaged(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path} is damaged: {reason[:300]}; {GET_ANEW}")


def _is_offset(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**64  # bool is an int to isinstance


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _integer(text: str) -> int | float:
    """A number without point; what 64 bits without sign cannot hold is no integer here, and fits no size."""
    return int(text) if text.isdigit() and len(text) <= 20 else _real(text)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a number")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether JSON nests more than `levels` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(_deeper(item, levels - 1) for item in inner))

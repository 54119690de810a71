"""Headers are checked, links stay in the folder, and other readers accept what is written."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from phi4_mlx.errors import CheckpointError
from phi4_mlx.files.safetensors import TensorWriter, file_in, read_header, tensor_bytes, weight_files

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_file(path: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> Path:
    """A file with any header, valid or not: text, bytes, or a value to write as JSON."""
    raw = header if isinstance(header, bytes) else header if isinstance(header, str) else json.dumps(header)
    raw = raw if isinstance(raw, bytes) else raw.encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def library_accepts(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "np") as file:
            file.keys()
        return True
    except safetensors.SafetensorError:
        return False


def we_accept(path: Path) -> bool:
    try:
        read_header(path)
        return True
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return False


GOOD: dict[str, tuple[Any, bytes]] = {
    "one tensor": ({"a": ENTRY}, bytes(8)),
    "no tensor": ({}, b""),
    "metadata": ({"__metadata__": {"format": "mlx"}, "a": ENTRY}, bytes(8)),
    "metadata null": ({"__metadata__": None, "a": ENTRY}, bytes(8)),
    "spaces around": ('  {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} \n', bytes(8)),
    "an extra field": ({"a": {**ENTRY, "note": {"deep": [[[1]]]}}}, bytes(8)),
    "a scalar": ({"a": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}}, bytes(8)),
    "empty, then any size": ({"a": {"dtype": "F32", "shape": [0, 2**63, 2**63], "data_offsets": [0, 0]}}, b""),
    "empty between two": (
        {
            "a": ENTRY,
            "e": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        },
        bytes(16),
    ),
    "out of order": (
        {
            "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]},
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
        bytes(16),
    ),
    "half bytes": ({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}, bytes(8)),
    "no name": ({"": ENTRY}, bytes(8)),
    "a name of two escapes": ('{"\\ud83d\\ude00":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
}

_TEXT = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
BAD: dict[str, tuple[Any, bytes]] = {
    "trailing byte": ({"a": ENTRY}, bytes(9)),
    "a byte short": ({"a": ENTRY}, bytes(7)),
    "gap at the start": ({"a": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
    "gap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [9, 17]}}, bytes(17)),
    "overlap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
    "same place": ({"a": ENTRY, "b": ENTRY}, bytes(8)),
    "empty inside another": ({"a": ENTRY, "e": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}, bytes(8)),
    "backwards": ({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8)),
    "wrong size": ({"a": {**ENTRY, "shape": [3]}}, bytes(8)),
    "unknown dtype": ({"a": {**ENTRY, "dtype": "f32"}}, bytes(8)),
    "dtype a number": ({"a": {**ENTRY, "dtype": 32}}, bytes(8)),
    "negative size": ({"a": {**ENTRY, "shape": [-2]}}, bytes(8)),
    "negative sizes": ({"a": {**ENTRY, "shape": [-1, -2]}}, bytes(8)),
    "fraction": ({"a": {**ENTRY, "shape": [2.0]}}, bytes(8)),
    "boolean": ({"a": {**ENTRY, "shape": [True, 2]}}, bytes(8)),
    "beyond 64 bits": ({"a": {**ENTRY, "shape": [2**64, 0], "data_offsets": [0, 0]}}, b""),
    "product beyond 64 bits": ({"a": {**ENTRY, "shape": [2**63, 2, 0], "data_offsets": [0, 0]}}, b""),
    "half a byte": ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, bytes(1)),
    "half a byte up": ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, bytes(2)),
    "three offsets": ({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, bytes(8)),
    "minus zero": (_TEXT.replace("[0,8]", "[-0,8]"), bytes(8)),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "a list": ([], b""),
    "a number": ("7", b""),
    "nothing": ("", b""),
    "not JSON": (_TEXT[:-1] + ",}", bytes(8)),
    "something after": (_TEXT + "\0", bytes(8)),
    "not UTF-8": (_TEXT.encode().replace(b'"a"', b'"\xff"'), bytes(8)),
    "UTF-16": (_TEXT.encode("utf-16"), bytes(8)),
    "byte order mark": (b"\xef\xbb\xbf" + _TEXT.encode(), bytes(8)),
    "half a character": (_TEXT.replace('"a"', '"\\ud800"'), bytes(8)),
    "control character": (_TEXT.replace('"a"', '"\1"'), bytes(8)),
    "NaN": (_TEXT.replace("[2]", "[2],\"x\":NaN"), bytes(8)),
    "infinity": (_TEXT.replace("[2]", "[2],\"x\":1e999"), bytes(8)),
    "5,000 digits": (_TEXT.replace("[2]", "[2],\"x\":" + "9" * 5000), bytes(8)),
    "deep": ("[" * 200_000, b""),
    "deep inside": (_TEXT.replace("[2]", "[2],\"x\":" + "[" * 130 + "]" * 130), bytes(8)),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": ENTRY}, bytes(8)),
    "metadata a list": ({"__metadata__": [], "a": ENTRY}, bytes(8)),
    "a field twice": (_TEXT.replace('"shape"', '"dtype":"F32","shape"'), bytes(8)),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_sound_headers_are_accepted_as_the_library_does(case: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / "x", *GOOD[case])
    assert library_accepts(path)
    assert we_accept(path)


@pytest.mark.parametrize("case", BAD)
def test_false_claims_are_refused_as_the_library_does(case: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / "x", *BAD[case])
    assert not library_accepts(path)
    assert not we_accept(path)


def test_stricter_than_the_library_in_two_things(tmp_path: Path) -> None:
    twice = write_file(tmp_path / "twice", _TEXT[:-1] + "," + _TEXT[1:])
    listed = write_file(tmp_path / "listed", '{"a":["F32",[2],[0,8]]}')
    assert library_accepts(twice) and library_accepts(listed)
    assert not we_accept(twice) and not we_accept(listed)


@pytest.mark.parametrize("length", [1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 100_000_001])
def test_absurd_lengths_are_refused_at_once(length: int, tmp_path: Path) -> None:
    path = write_file(tmp_path / "x", {"a": ENTRY}, length=length)
    assert not library_accepts(path)
    assert not we_accept(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000) + b"{")
        file.truncate(300_000_000)  # sparse: takes no room
    with pytest.raises(CheckpointError, match="200,000,000 bytes"):
        read_header(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_file(tmp_path / "x", {"a": ENTRY}).read_bytes()
    for end in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:end])
        assert not we_accept(tmp_path / "x"), f"cut at {end}"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: None])
def test_what_is_not_a_file_is_refused_without_waiting(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "x")
    assert not we_accept(tmp_path / "x")


_BITS = [b"0", b"-", b"9", b",", b'"', b"{}", b"[]", b" ", b"null", b"1e3", b"\\u0041"]
_WORDS = [b"F32", b"BF16", b"U32", b"F4", b"dtype", b"shape", b"data_offsets", b"__metadata__", b":", b","]


def _mutated(rng: random.Random, whole: bytes) -> bytes:
    """A file with one to three of its bytes, digits or words changed, mostly in the header."""
    data = bytearray(whole)
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(header_end, len(data)))
        match rng.randrange(8):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                del data[at : at + rng.randint(1, 9)]
            case 3:
                data[at:at] = rng.choice(_BITS)
            case 4:
                del data[rng.randrange(len(data)) :]
            case 5:
                data += rng.randbytes(rng.randint(1, 9))
            case 6:
                data = bytearray(bytes(data).replace(rng.choice(_WORDS), rng.choice(_WORDS), 1))
            case 7:  # a digit
                digits = [i for i in range(8, min(header_end, len(data))) if 48 <= data[i] <= 57]
                if digits:
                    data[rng.choice(digits)] = rng.randrange(48, 58)
        if len(data) < 9:
            break
    if rng.random() < 0.7 and len(data) > 8 + len(whole) - header_end:  # keep the length field correct
        data[:8] = struct.pack("<Q", len(data) - 8 - (len(whole) - header_end))
    return bytes(data)


def _seeds() -> list[bytes]:
    arrays = {
        "model.embed_tokens.weight": np.arange(24, dtype=np.uint32).reshape(4, 6),
        "model.norm.weight": np.ones(6, np.float16),
        "scalar": np.array(1.0, np.float32),
        "empty": np.zeros((0, 3), np.uint8),
    }
    plain = {"a": ENTRY, "b": {"dtype": "U8", "shape": [3, 1], "data_offsets": [8, 11]}}
    raw = json.dumps(plain).encode()
    return [safetensors.numpy.save(arrays, {"format": "mlx"}), struct.pack("<Q", len(raw)) + raw + bytes(11)]


def test_four_thousand_mutated_files_are_accepted_exactly_if_the_library_accepts_them(tmp_path: Path) -> None:
    rng = random.Random(4)
    path = tmp_path / "x"
    verdicts = {True: 0, False: 0}
    for round_ in range(4000):
        data = _mutated(rng, rng.choice(_SEEDS))
        path.write_bytes(data)
        theirs, ours = library_accepts(path), we_accept(path)
        verdicts[theirs] += 1
        if theirs != ours:
            # The only difference allowed: a name that now appears twice.
            assert theirs and "twice" in _reason(path), f"round {round_}: library {theirs}, we {ours}: {data!r}"
    assert verdicts[True] > 150 and verdicts[False] > 2000, verdicts


_SEEDS = _seeds()


def _reason(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    return str(caught.value)


def test_offsets_are_those_of_the_file(tmp_path: Path) -> None:
    arrays = {"a": np.arange(5, dtype=np.int16), "b": np.arange(6, dtype=np.float32).reshape(2, 3)}
    path = tmp_path / "x"
    safetensors.numpy.save_file(arrays, path)
    raw = path.read_bytes()
    infos = read_header(path)
    assert {name: info.shape for name, info in infos.items()} == {"a": (5,), "b": (2, 3)}
    for name, array in arrays.items():
        assert raw[infos[name].start : infos[name].end] == array.tobytes()


@pytest.mark.parametrize(
    ("dtype", "shape", "size"), [("BF16", (3, 4), 24), ("F4", (4,), 2), ("U32", (), 4), ("U8", (0,), 0)]
)
def test_tensor_bytes(dtype: str, shape: tuple[int, ...], size: int) -> None:
    assert tensor_bytes(dtype, shape) == size


# --- the writer ---


def test_what_is_written_is_read_by_the_library_and_by_mlx(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"a": ("BF16", (2, 3)), "e": ("U8", (0,)), "ü": ("U32", (2,)), "s": ("F32", ())}
    with TensorWriter(path, tensors) as writer:
        writer.write("a", [bytes(range(4)), bytes(range(4, 12))])  # in two pieces
        writer.write("e", [])
        writer.write("ü", [memoryview(np.array([7, 8], np.uint32))])
        writer.write("s", [np.float32(1.5).tobytes()])
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {name: (info.dtype, info.shape) for name, info in read_header(path).items()} == tensors
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "mlx"}
        assert file.get_tensor("ü").tolist() == [7, 8]
    loaded = mx.load(str(path))
    assert loaded["a"].view(mx.uint16).tolist() == [[256, 770, 1284], [1798, 2312, 2826]]
    assert loaded["s"].item() == 1.5


def test_the_numbers_begin_at_a_multiple_of_eight(tmp_path: Path) -> None:
    for length in range(1, 9):
        path = tmp_path / str(length)
        with TensorWriter(path, {"n" * length: ("U8", (1,))}) as writer:
            writer.write("n" * length, [b"x"])
        assert read_header(path)["n" * length].start % 8 == 0


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    with pytest.raises(FileExistsError):
        TensorWriter(tmp_path / "x", {})
    assert (tmp_path / "x").read_text() == "precious"


def test_the_writer_refuses_what_its_header_does_not_say(tmp_path: Path) -> None:
    tensors = {"a": ("U8", (2,)), "b": ("U8", (2,))}
    with pytest.raises(AssertionError, match="out of order"), TensorWriter(tmp_path / "1", tensors) as writer:
        writer.write("b", [b"12"])
    with pytest.raises(AssertionError, match="size"), TensorWriter(tmp_path / "2", tensors) as writer:
        writer.write("a", [b"1"])
    with pytest.raises(AssertionError, match="size"), TensorWriter(tmp_path / "3", tensors) as writer:
        writer.write("a", [b"123"])
    with pytest.raises(AssertionError, match="lacks"), TensorWriter(tmp_path / "4", tensors) as writer:
        writer.write("a", [b"12"])
    for name in "1234":
        assert not we_accept(tmp_path / name)


# --- the folder ---


def _shard(path: Path, *names: str) -> None:
    safetensors.numpy.save_file({name: np.ones(2, np.float32) for name in names}, path)


def _sharded(folder: Path) -> Path:
    folder.mkdir(parents=True)
    _shard(folder / "model-00001-of-00002.safetensors", "a", "b")
    _shard(folder / "model-00002-of-00002.safetensors", "c")
    _index(folder, {"a": 1, "b": 1, "c": 2})
    return folder


def _index(folder: Path, shards: dict[str, int]) -> None:
    weight_map = {name: f"model-{number:05}-of-00002.safetensors" for name, number in shards.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_one_file_shards_and_shards_without_an_index(tmp_path: Path) -> None:
    folder = _sharded(tmp_path / "m")
    shards = {name: path.name[6:11] for name, path in weight_files(folder).items()}
    assert shards == {"a": "00001", "b": "00001", "c": "00002"}
    (folder / "model.safetensors.index.json").unlink()
    assert weight_files(folder).keys() == {"a", "b", "c"}
    (tmp_path / "one").mkdir()
    _shard(tmp_path / "one" / "model.safetensors", "a")
    _shard(tmp_path / "one" / "adapters.safetensors", "z")  # not of the model
    assert weight_files(tmp_path / "one").keys() == {"a"}


def _break_index(text: str) -> Any:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


FOLDERS: dict[str, tuple[Any, str]] = {
    "no weights": (lambda f: [path.unlink() for path in f.iterdir()], "holds no model"),
    "only pickle": (
        lambda f: [path.unlink() for path in f.iterdir()] + [(f / "pytorch_model.bin").write_bytes(b"")], "never read"
    ),
    "missing shard": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "00002.safetensors is missing"),
    "truncated shard": (lambda f: os.truncate(f / "model-00002-of-00002.safetensors", 70), "damaged"),
    "absent tensor": (lambda f: _index(f, {"a": 1, "b": 1, "c": 2, "d": 2}), "lacks d"),
    "unlisted tensor": (lambda f: _index(f, {"a": 1, "c": 2}), "holds b"),
    "tensor elsewhere": (lambda f: _index(f, {"a": 2, "b": 1, "c": 2}), "holds a"),
    "unlisted shard": (lambda f: _shard(f / "model.safetensors", "a"), "stale"),
    "index not JSON": (_break_index("{"), "not JSON"),
    "index without a map": (_break_index("{}"), "no weight_map"),
    "index of a list": (_break_index('{"weight_map": ["a"]}'), "no weight_map"),
    "index of numbers": (_break_index('{"weight_map": {"a": 1}}'), "no weight_map"),
    "path in the index": (_break_index('{"weight_map": {"a": "../m/model-00001-of-00002.safetensors"}}'), "stale"),
    "index a folder": (
        lambda f: [(f / "model.safetensors.index.json").unlink(), (f / "model.safetensors.index.json").mkdir()],
        "not a regular file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_inconsistent_folders_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    damage, reason = FOLDERS[case]
    folder = _sharded(tmp_path / "m")
    weight_files(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        weight_files(folder)
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_files_without_an_index(tmp_path: Path) -> None:
    folder = _sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").unlink()
    _shard(folder / "model-00002-of-00002.safetensors", "b")
    with pytest.raises(CheckpointError, match="b is in both"):
        weight_files(folder)


@pytest.mark.parametrize("name", ["", ".", "..", "../m/{}", "./{}", "/etc/hostname", "a\0b"])
def test_only_plain_names_are_files_of_a_folder(name: str, tmp_path: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    folder = _sharded(tmp_path / "m")
    assert file_in(folder, shard) == folder / shard
    with pytest.raises(CheckpointError, match=r"not the name of a file|outside the folder"):
        file_in(folder, name.format(shard))


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    folder = _sharded(tmp_path / "m")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside the folder"):
        weight_files(folder)
    shard.unlink()
    (tmp_path / "elsewhere").rename(folder / "c.safetensors")
    shard.symlink_to("c.safetensors")  # within the folder, and the folder itself through a link
    (tmp_path / "link").symlink_to(folder)
    assert weight_files(tmp_path / "link").keys() == {"a", "b", "c"}
    shard.unlink()
    shard.symlink_to(shard.name)  # in a circle
    with pytest.raises(CheckpointError, match="missing"):
        weight_files(folder)


def test_a_hub_cache_may_link_to_its_own_blobs_and_nowhere_else(tmp_path: Path) -> None:
    repo = tmp_path / "models--owner--name"
    folder = _sharded(repo / "snapshots" / "0123abcd")
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repo / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert weight_files(folder).keys() == {"a", "b", "c"}
    shard = folder / "model-00002-of-00002.safetensors"
    (repo / "blobs" / "1").rename(repo / "1")
    shard.unlink()
    shard.symlink_to("../../1")
    with pytest.raises(CheckpointError, match="outside the folder"):
        weight_files(folder)

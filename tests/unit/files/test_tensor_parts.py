"""Parts of tensors against slices of the whole ones."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.errors import CheckpointError
from phi4_mlx.files import tensor_parts
from phi4_mlx.files.safetensors import Stored, read_header
from phi4_mlx.files.tensor_parts import read_part

TENSOR = np.arange(2 * 12 * 10, dtype=np.uint16).reshape(2, 12, 10)


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    path = tmp_path / "file.safetensors"
    mx.save_safetensors(str(path), {"before": mx.zeros(7), "tensor": mx.array(TENSOR), "zero": mx.array(3.5)})
    return Stored(path, "tensor", read_header(path)["tensor"])


@pytest.mark.parametrize("most", [7, 2**24])
@pytest.mark.parametrize("ranges", [[(0, 1)], [(1, 2)], [(0, 2)], [(0, 1), (1, 2)], []])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_part_is_a_slice(
    stored: Stored, axis: int, ranges: list[tuple[int, int]], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_parts, "MOST", most)
    indices = [index for start, end in ranges for index in range(start, end)]
    expected = np.take(TENSOR, np.array(indices, dtype=int), axis=axis)
    found = np.frombuffer(read_part(stored, axis, ranges), dtype=np.uint16)
    assert found.tolist() == expected.reshape(-1).tolist()


def test_a_whole_tensor_and_a_number_are_read(stored: Stored) -> None:
    assert bytes(read_part(stored)) == TENSOR.tobytes()
    zero = Stored(stored.path, "zero", read_header(stored.path)["zero"])
    assert np.frombuffer(read_part(zero), dtype=np.float32).tolist() == [3.5]


def test_a_file_that_was_cut_is_reported(stored: Stored) -> None:
    with stored.path.open("r+b") as file:
        file.truncate(stored.info.start + 10)
    with pytest.raises(CheckpointError, match=r"was cut while tensor was read; load the model again"):
        read_part(stored)
    stored.path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_part(stored)

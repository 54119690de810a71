"""Arrays that are read from the disk at their first use."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import pytest

from phi4_mlx.errors import CheckpointError
from phi4_mlx.files.lazy_arrays import unchanged


def test_a_cut_file_is_reported_once_and_not_to_whoever_computes_next(tmp_path: Path) -> None:
    for turn in range(60):  # without the wait, some 3 of them fail
        path = tmp_path / f"{turn}.safetensors"
        mx.save_safetensors(str(path), {str(each): mx.ones((100, 100)) for each in range(60)})
        arrays = mx.load(str(path))
        os.truncate(path, 50_000)
        with pytest.raises(CheckpointError, match=r"^the weights of it changed .*load the model again$"), unchanged(
            "the weights of it"
        ):
            mx.eval(arrays)
        assert mx.ones(3).sum().item() == 3

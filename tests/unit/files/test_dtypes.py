"""The table of dtypes agrees with mlx and with the library of the format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from phi4_mlx.files.dtypes import DTYPES, FLOATS, mlx_dtype, name_of
from phi4_mlx.files.safetensors import read_header
from tests.conftest import ROOT

IN_MLX = [name for name, dtype in DTYPES.items() if dtype.mlx_name]


@pytest.mark.parametrize("name", IN_MLX)
def test_names_and_sizes_are_those_of_mlx(name: str) -> None:
    assert name_of(mlx_dtype(name)) == name
    assert mlx_dtype(name).size * 8 == DTYPES[name].bits


@pytest.mark.parametrize("name", sorted({*IN_MLX} - {"F64"}))  # mlx computes float64 on the CPU only, and saves none
def test_mlx_writes_these_names(name: str, tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": mx.zeros(3, mlx_dtype(name))})
    assert read_header(tmp_path / "x.safetensors")["a"].dtype == name


def test_the_floats_are_what_models_compute_in() -> None:
    assert {mlx_dtype(name) for name in FLOATS} == {mx.float16, mx.bfloat16, mx.float32}


def test_the_table_does_not_load_mlx() -> None:
    code = "import sys, phi4_mlx.files.safetensors; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0

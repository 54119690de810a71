"""NaN, infinity and numbers that a dtype does not hold: refused by the converter, by the tensor's name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import load
from phi4_mlx.convert import weights
from phi4_mlx.convert.package import convert
from phi4_mlx.errors import CheckpointError, RequestError
from tests.conftest import TinyCheckpoint
from tests.unit.test_checkpoint import rewrite

DOWN = "model.layers.1.mlp.down_proj"
QUANTISED = {"quantize": True, "q_group_size": 32}


def poisoned(folder: Path, value: float, name: str, row: int = -1) -> Path:
    """Puts a number into a tensor of a checkpoint."""
    tensors = mx.load(str(folder / "model.safetensors"))
    array = tensors[name]
    mx.eval(array)
    array[row] = mx.array(value, array.dtype)
    return rewrite(folder, **{name: array})


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, QUANTISED, {"dtype": "float16"}, {**QUANTISED, "q_mode": "mxfp4"}])
def test_nan_and_infinity_are_refused_by_name(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, dtype: mx.Dtype, value: float, options: dict[str, Any]
) -> None:
    for name in (f"{DOWN}.weight", "model.norm.weight"):
        source = poisoned(tiny_checkpoint(dtype=dtype), value, name)
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} contains NaN or infinity"):
            convert(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["scales", "biases"])
@pytest.mark.parametrize("options", [{}, {"dequantize": True}])
def test_scales_that_are_not_finite_are_refused_by_name(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    convert(tiny_checkpoint(dtype=mx.bfloat16), tmp_path / "package", **QUANTISED)
    source = poisoned(tmp_path / "package", math.nan, f"{DOWN}.{name}")
    with pytest.raises(CheckpointError, match=rf"{DOWN}\.{name} contains NaN or infinity"):
        convert(source, tmp_path / "out", **options)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("value", [1e5, -1e5, 1e30])
@pytest.mark.parametrize("options", [{}, QUANTISED])
def test_numbers_that_float16_does_not_hold_are_refused_by_name(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, dtype: mx.Dtype, value: float, options: dict[str, Any]
) -> None:
    source = poisoned(tiny_checkpoint(dtype=dtype), value, f"{DOWN}.weight")
    with pytest.raises(RequestError, match=rf"{DOWN}\.\w+ has numbers too large for float16, such as [\d.e+]+; c"):
        convert(source, tmp_path / "out", dtype="float16", **options)
    assert not (tmp_path / "out").exists()
    for kept in ("bfloat16", "float32"):
        convert(source, tmp_path / kept, dtype=kept, **options)
        load(tmp_path / kept)


@pytest.mark.parametrize("value", [2700, -1e5, 1e30])
def test_numbers_that_nvfp4_cuts_off_are_refused_by_name(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, value: float
) -> None:
    source = poisoned(tiny_checkpoint(), value, f"{DOWN}.weight")
    with pytest.raises(RequestError, match=rf"{DOWN} has numbers too large for nvfp4, .* 2,688, such as .*--q-mode"):
        convert(source, tmp_path / "out", quantize=True, q_mode="nvfp4")
    convert(source, tmp_path / "mxfp4", quantize=True, q_mode="mxfp4")
    convert(poisoned(tiny_checkpoint(), 2650, f"{DOWN}.weight"), tmp_path / "out", quantize=True, q_mode="nvfp4")


def test_the_largest_finite_numbers_pass(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = poisoned(tiny_checkpoint(), -65504, f"{DOWN}.weight")
    convert(source, tmp_path / "half", dtype="float16")
    assert mx.load(str(tmp_path / "half" / "model.safetensors"))[f"{DOWN}.weight"].min().item() == -65504


def test_every_block_is_checked(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", 2**10)
    for row in (0, 40, -1):
        source = poisoned(tiny_checkpoint(), 1e6, f"{DOWN}.weight", row)
        with pytest.raises(RequestError, match="such as 1e\\+06"):
            convert(source, tmp_path / "out", dtype="float16")

"""Conversion in blocks of rows gives the same tensors as mlx on whole tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.config.fields import QUANTIZATION_MODES
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.convert import weights
from phi4_mlx.convert.quantize import make_recipe, quantization_config
from phi4_mlx.convert.weights import Parameter, Stored, plan, write_shard
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.safetensors import read_header

Checkpoint = Callable[..., Path]
MATRIX, VECTOR = "model.layers.1.mlp.down_proj", "model.norm.weight"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that split even a tiny tensor, unevenly."""
    monkeypatch.setattr(weights, "BLOCK_BYTES", 5000)


def converted(folder: Path, out: Path, recipe: Any = None, dtype: str | None = None, dequantize: bool = False) -> dict:
    parameters = plan(folder, ModelConfig.from_folder(folder), recipe, dtype, dequantize)
    write_shard(out, parameters, lambda count: None)
    return dict(mx.load(str(out), format="safetensors"))


def original(folder: Path) -> dict[str, mx.array]:
    return {name: array for path in folder.glob("model*.safetensors") for name, array in mx.load(str(path)).items()}


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_without_options_the_tensors_stay_as_they_are(
    tiny_checkpoint: Checkpoint, dtype: mx.Dtype, shards: int, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(dtype=dtype, shards=shards)
    found, expected = converted(folder, tmp_path / "out"), original(folder)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("name", "dtype"), [("F16", mx.float16), ("BF16", mx.bfloat16), ("F32", mx.float32)])
def test_dtype_casts_every_tensor(tiny_checkpoint: Checkpoint, name: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    folder = tiny_checkpoint(dtype=mx.bfloat16)
    found, expected = converted(folder, tmp_path / "out", dtype=name), original(folder)
    assert all(same(found[name], expected[name].astype(dtype)) for name in expected)


@pytest.mark.parametrize("mode", QUANTIZATION_MODES)
@pytest.mark.parametrize("dtype", [None, "F16"])
def test_blocks_of_rows_are_quantised_as_the_whole_matrix_is(
    tiny_checkpoint: Checkpoint, mode: str, dtype: str | None, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(dtype=mx.bfloat16)
    recipe = make_recipe(mode, None, 32 if mode == "affine" else None, 8 if mode == "affine" else None)
    found, expected = converted(folder, tmp_path / "out", recipe, dtype), original(folder)
    if dtype:
        expected = {name: array.astype(mx.float16) for name, array in expected.items()}
    for name, array in expected.items():
        path = name.removesuffix(".weight")
        parts = [array] if array.ndim == 1 else mx.quantize(array, **vars(recipe.scheme_of(path)))
        for part, suffix in zip(parts, ("weight", "scales", "biases"), strict=False):
            assert same(found.pop(f"{path}.{suffix}"), part), name
    assert not found


def packed(folder: Path, out: Path, mode: str) -> Path:
    """A quantised checkpoint made of a plain one."""
    recipe = make_recipe(mode, None, 32 if mode == "affine" else None, None)
    parameters = plan(folder, ModelConfig.from_folder(folder), recipe, None, False)
    out.mkdir()
    write_shard(out / "model.safetensors", parameters, lambda count: None)
    settings = quantization_config({p.path: p.target for p in parameters if p.target})
    raw = json.loads((folder / "config.json").read_text()) | {"quantization": settings}
    (out / "config.json").write_text(json.dumps(raw))
    return out


@pytest.mark.parametrize("mode", QUANTIZATION_MODES)
def test_a_quantised_checkpoint_is_copied_dequantised_or_quantised_again(
    tiny_checkpoint: Checkpoint, mode: str, tmp_path: Path
) -> None:
    folder = packed(tiny_checkpoint(dtype=mx.float16), tmp_path / "packed", mode)
    before = original(folder)
    copy = converted(folder, tmp_path / "copy")
    assert copy.keys() == before.keys() and all(same(copy[name], before[name]) for name in before)

    parts = [before[f"{MATRIX}.{part}"] for part in ("weight", "scales", "biases") if f"{MATRIX}.{part}" in before]
    scheme = make_recipe(mode, None, 32 if mode == "affine" else None, None).scheme
    plain = mx.dequantize(*parts, **vars(scheme)).astype(mx.float16)
    unpacked = converted(folder, tmp_path / "unpacked", dequantize=True)
    assert same(unpacked[f"{MATRIX}.weight"], plain)
    assert not any(name.endswith("scales") for name in unpacked)
    assert same(unpacked[VECTOR], before[VECTOR])

    recipe = make_recipe("affine", 8, 32, None)
    again = converted(folder, tmp_path / "again", recipe, "F32", dequantize=True)
    plain = mx.dequantize(*parts, **vars(scheme)).astype(mx.float32)
    weight, scales, biases = mx.quantize(plain, **vars(recipe.scheme))
    assert same(again[f"{MATRIX}.weight"], weight)
    assert same(again[f"{MATRIX}.scales"], scales) and same(again[f"{MATRIX}.biases"], biases)


def test_what_is_done_already_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = tiny_checkpoint()
    with pytest.raises(RequestError, match="is not quantised; drop --dequantize"):
        converted(plain, tmp_path / "x", dequantize=True)
    with pytest.raises(RequestError, match="is quantised already"):
        converted(packed(plain, tmp_path / "packed", "mxfp4"), tmp_path / "x", make_recipe("affine", 8, 32, None))


def test_progress_counts_every_byte_once(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(dtype=mx.bfloat16)
    counts: list[int] = []
    parameters = plan(folder, ModelConfig.from_folder(folder), make_recipe("affine", 4, 32, None), None, False)
    write_shard(tmp_path / "out", parameters, counts.append)
    infos = read_header(folder / "model.safetensors").values()
    assert sum(counts) == sum(info.end - info.start for info in infos)
    assert len(counts) > 2 * len(parameters) and min(counts) > 0


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four matrices of 16 MB each pass through within 4 MB, blocks of 256 KB at a time."""
    monkeypatch.setattr(weights, "BLOCK_BYTES", 2**18)
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {str(n): mx.zeros((8192, 1024), mx.bfloat16) for n in range(4)})
    scheme = make_recipe("affine", 4, 64, None).scheme
    layout = partial(scheme.layout, dtype="BF16", shape=(8192, 1024))
    parameters = [
        Parameter(name, (Stored(path, name, info),), layout(name), "BF16", None, scheme, 1024, False)
        for name, info in read_header(path).items()
    ]
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    write_shard(tmp_path / "out", parameters, lambda count: None)
    assert mx.get_peak_memory() - before < 4 * 2**20


def test_a_file_that_shrinks_meanwhile_is_reported(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    parameters = plan(folder, ModelConfig.from_folder(folder), None, None, False)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(parameters[2].inputs[0].info.start + 10)
    with pytest.raises(CheckpointError, match="ended early"):
        write_shard(tmp_path / "out", parameters, lambda count: None)


def test_a_file_that_is_removed_meanwhile_is_reported(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    parameters = plan(folder, ModelConfig.from_folder(folder), None, None, False)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        write_shard(tmp_path / "out", parameters, lambda count: None)

"""Fingerprints: equal for equal models and adapters, different after any change."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from phi4_mlx.adapters.folder import write_folder
from phi4_mlx.adapters.layers import adapter_layers, adapter_off, add_adapter, current_adapter
from phi4_mlx.checkpoint import load_model
from phi4_mlx.fingerprint import WITHOUT, adapter_fingerprint, base_fingerprint, checksum
from phi4_mlx.lora.fuse import fuse
from tests.conftest import TinyCheckpoint, TinyModel


@pytest.mark.parametrize("dtype", [np.float32, np.uint32, np.float16, np.uint8])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 8), (2, 3, 7)])
def test_every_flipped_bit_changes_the_checksum(dtype: type, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.random.default_rng(0).integers(0, 100, shape)).astype(dtype)
    whole = checksum(b"", [mx.array(array)])
    assert len(whole) == 32 and whole == checksum(b"", [mx.array(array)]) != checksum(b"x", [mx.array(array)])
    for bit in range(array.nbytes * 8):
        data = bytearray(array.tobytes())
        data[bit // 8] ^= 1 << bit % 8
        damaged = np.frombuffer(bytes(data), dtype).reshape(shape)
        assert checksum(b"", [mx.array(damaged)]) != whole, bit


def test_the_base_fingerprint_ignores_an_adapter_and_changes_when_it_is_fused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint()
    model = load_model(folder)
    base = base_fingerprint(model)
    assert adapter_fingerprint(model) == WITHOUT
    add_adapter(model, scale=2.0)
    assert base_fingerprint(model) == base and adapter_fingerprint(model) != WITHOUT
    with adapter_off(model):
        assert adapter_fingerprint(model) == WITHOUT
    for layer in adapter_layers(model).values():
        layer.update(tree_map(lambda array: array + 0.1, layer.trainable_parameters()))
    write_folder(tmp_path / "adapter", current_adapter(model, ""), len(model.layers))
    fuse(folder, tmp_path / "adapter", tmp_path / "fused")
    fused = load_model(tmp_path / "fused")
    assert base_fingerprint(fused) != base  # although config, shapes and norms are equal
    assert adapter_fingerprint(fused) == WITHOUT


def test_other_weights_config_or_dtype_change_the_fingerprint(tiny_model: TinyModel) -> None:
    half = tiny_model()
    half.set_dtype(mx.bfloat16)
    models = [tiny_model(), tiny_model(seed=1), tiny_model(rms_norm_eps=1e-6), half]
    assert len({*map(base_fingerprint, models)}) == 4
    assert base_fingerprint(tiny_model()) == base_fingerprint(models[0])

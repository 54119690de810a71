"""An adapter on the model: the same as its product added to the weights, and refused where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from phi4_mlx.errors import CheckpointError, ConfigError, Phi4Error
from phi4_mlx.lora.layers import load_adapter
from phi4_mlx.models.text import Model

KEYS = ("self_attn.qkv_proj", "mlp.down_proj")
IDS = mx.array([[5, 6, 7, 8]])


def write_adapter(folder: Path, scale: Any = 2.0, kind: str = "lora", **changes: mx.array | None) -> Path:
    """A rank-4 adapter for the second layer, as mlx-lm writes it."""
    tensors: dict[str, mx.array] = {}
    for key, (width, out) in zip(KEYS, ((96, 160), (160, 96)), strict=True):
        tensors[f"model.layers.1.{key}.lora_a"] = 0.1 * mx.random.normal((width, 4), key=mx.random.key(1))
        tensors[f"model.layers.1.{key}.lora_b"] = 0.1 * mx.random.normal((4, out), key=mx.random.key(2))
    tensors |= {name.replace("__", "."): array for name, array in changes.items() if array is not None}
    for name, array in changes.items():
        if array is None:
            del tensors[name.replace("__", ".")]
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    parameters = {"rank": 4, "scale": scale, "dropout": 0.0, "keys": KEYS}
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_equals_its_product_in_the_weights(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    model, merged = tiny_model(), tiny_model()
    tensors = mx.load(str(write_adapter(tmp_path / "a") / "adapters.safetensors"))
    for key in KEYS:
        layer: Any = merged.layers[1]
        for name in key.split("."):
            layer = layer[name]
        a, b = (tensors[f"model.layers.1.{key}.lora_{x}"] for x in "ab")
        layer.weight = layer.weight + 2.0 * (a @ b).T
    before = model(IDS)
    load_adapter(model, tmp_path / "a")
    assert mx.allclose(model(IDS), merged(IDS), atol=1e-4)
    assert not mx.allclose(model(IDS), before, atol=1e-2)


def test_mlx_lm_reads_the_same_folder_the_same_way(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    ours, theirs = tiny_model(), tiny_model()
    load_adapter(ours, write_adapter(tmp_path / "a"))
    load_adapters(theirs, str(tmp_path / "a"))
    assert mx.allclose(ours(IDS), theirs(IDS), atol=1e-5)


def test_an_adapter_goes_on_a_quantised_model(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    model = tiny_model()
    nn.quantize(model, group_size=32, bits=8)
    before = model(IDS)
    load_adapter(model, write_adapter(tmp_path / "a"))
    assert model(IDS).shape == (1, 4, 512) and not mx.allclose(model(IDS), before, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dora"}, "dora"),
        ({"scale": None}, "scale None"),
        ({"scale": True}, "scale True"),
        ({"model__layers__1__mlp__down_proj__lora_b": None}, "both lora_a and lora_b"),
        ({"model__layers__9__mlp__down_proj__lora_b": mx.zeros((4, 96))}, "layers.9"),
        ({"model__layers__1__mlp__down_proj__m": mx.zeros(96)}, "5 tensors for 2 layers"),
        ({"model__layers__1__mlp__down_proj__lora_a": mx.zeros((161, 4))}, r"\[161, 4\]"),
        ({"model__layers__1__mlp__down_proj__lora_b": mx.zeros((3, 96))}, r"\[3, 96\]"),
        ({"model__layers__1__mlp__down_proj__lora_b": mx.zeros((4, 96), mx.int32)}, "I32"),
    ],
)
def test_what_does_not_fit_is_named(
    tiny_model: Callable[..., Model], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapter(tiny_model(), write_adapter(tmp_path / "a", **options))
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        load_adapter(tiny_model(), tmp_path)
    (write_adapter(tmp_path / "a") / "adapters.safetensors").unlink()
    with pytest.raises(Phi4Error, match=r"adapters\.safetensors"):
        load_adapter(tiny_model(), tmp_path / "a")

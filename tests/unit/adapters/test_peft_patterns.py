"""PEFT adapters whose layers have ranks and scales of their own, against weights that are merged by PEFT's rules."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import load
from phi4_mlx.adapters.layers import load_adapter
from phi4_mlx.errors import RequestError
from phi4_mlx.lora.export import from_peft, to_peft
from phi4_mlx.models.text import Model
from tests.conftest import TinyCheckpoint

IDS = mx.array([[5, 6, 7, 8, 9]])
PLACES = {"self_attn.qkv_proj": (96, 160), "self_attn.o_proj": (96, 96), "mlp.down_proj": (160, 96)}  # [in], [out]
PATHS = [f"model.layers.{n}.{place}" for n in range(2) for place in PLACES]


def of_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the value of the first key that matches the end of the path."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def write(folder: Path, dtype: mx.Dtype = mx.float32, **fields: Any) -> dict[str, tuple[mx.array, mx.array, float]]:
    """Writes a PEFT folder; returns A [R, in], B [out, R] and the scale of each layer."""
    folder.mkdir()
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": ["qkv_proj", "o_proj", "down_proj"], "rank_pattern": {}, "alpha_pattern": {}, **fields,
    }  # fmt: skip
    layers, tensors = {}, {}
    for number, path in enumerate(PATHS):
        rank = of_pattern(config["rank_pattern"], path, config["r"])
        alpha = of_pattern(config["alpha_pattern"], path, config["lora_alpha"])
        width, out = PLACES[path.split(".", 3)[3]]
        a = (0.2 * mx.random.normal((rank, width), key=mx.random.key(number))).astype(dtype)
        b = (0.2 * mx.random.normal((out, rank), key=mx.random.key(number + 50))).astype(dtype)
        layers[path] = a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
        if config.get("use_dora"):
            tensors[f"base_model.model.{path}.lora_magnitude_vector"] = 1 + mx.arange(out) / 200
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return layers


def merged(model: Model, layers: Mapping[str, tuple[mx.array, mx.array, float]], dora: bool) -> mx.array:
    """The logits of the base with every layer's product added to its weights."""
    weights = []
    for path, (a, b, scale) in layers.items():
        _, _, number, room, name = path.split(".")
        weight = model.layers[int(number)][room][name].weight + scale * (b.astype(mx.float32) @ a.astype(mx.float32))
        if dora:
            rows = weight.shape[0]
            weight = weight * ((1 + mx.arange(rows) / 200) / mx.linalg.norm(weight, axis=1))[:, None]
        weights.append((f"{path}.weight", weight))
    model.load_weights(weights, strict=False)
    return model(IDS)


PATTERNS = [
    {"rank_pattern": {"qkv_proj": 8}},
    {"alpha_pattern": {"down_proj": 1.5}},
    {"rank_pattern": {"model.layers.0.mlp.down_proj": 1, "down_proj": 7}, "alpha_pattern": {"o_proj": 0}},
    {"rank_pattern": {"layers\\.1\\..*_proj": 6, "^model\\.layers\\.0.*proj": 3}, "alpha_pattern": {"0.+qkv_proj": -3}},
    {"rank_pattern": {"(q|k|qkv)_proj": 2, "proj": 9}, "alpha_pattern": {"mlp\\.(down|up)_proj": 64, "attn": 5}},
    {"lora_alpha": 0, "alpha_pattern": {"[a-z]_proj": 2}, "r": 1, "rank_pattern": {"o_proj": 5}},
]


@pytest.mark.parametrize("fields", PATTERNS)
@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_every_layer_has_its_own_rank_and_scale(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, fields: dict[str, Any], kind: dict[str, Any]
) -> None:
    base = tiny_checkpoint()
    layers = write(tmp_path / "peft", **fields, **kind)
    expected = merged(load(base)[0], layers, "use_dora" in kind)
    found = load(base, adapter_path=tmp_path / "peft")[0](IDS)
    assert mx.abs(found - expected).max() < 1e-4
    assert mx.abs(found - load(base)[0](IDS)).max() > 0.1
    from_peft(tmp_path / "peft", tmp_path / "ours")
    to_peft(tmp_path / "ours", tmp_path / "again")
    for folder in ("ours", "again"):
        assert mx.abs(load(base, adapter_path=tmp_path / folder)[0](IDS) - expected).max() < 1e-4


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_scale_is_not_rounded_to_half_precision(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, dtype: mx.Dtype
) -> None:
    base = tiny_checkpoint()
    alphas = {"o_proj": 3.3, "down_proj": 0.7}
    layers = write(tmp_path / "peft", dtype, alpha_pattern=alphas, rank_pattern={"qkv_proj": 5})
    expected = merged(load(base)[0], layers, False)
    assert mx.abs(load(base, adapter_path=tmp_path / "peft")[0](IDS) - expected).max() < 1e-4


def test_all_alphas_of_zero_change_nothing(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint()
    write(tmp_path / "peft", lora_alpha=0)
    assert mx.array_equal(load(base, adapter_path=tmp_path / "peft")[0](IDS), load(base)[0](IDS))


@pytest.mark.parametrize(
    "targets", ["all-linear", r".*(qkv|o|down)_proj", "(?:.*?(?:language|text).*?(?:attn|mlp).*?)|x"]
)
def test_a_pattern_of_target_modules_is_peft_s_own_affair(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, targets: str
) -> None:
    """PEFT saves the tensors of the layers that it chose."""
    base = tiny_checkpoint()
    layers = write(tmp_path / "peft", target_modules=targets, exclude_modules=".*lm_head", layers_to_transform=None)
    expected = merged(load(base)[0], layers, False)
    assert mx.abs(load(base, adapter_path=tmp_path / "peft")[0](IDS) - expected).max() < 1e-4


@pytest.mark.parametrize(
    "key", ["(a|a)*b", "([a-z.]+)+!", "(.*)*x", ".*.*.*.*.*.*x", "(\\w*){30}x", "a" * 2000, "[", "(?P<a", "a{4,2}", "*"]
)
def test_a_pattern_that_could_take_hours_or_is_none_is_refused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, key: str
) -> None:
    write(tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    config["alpha_pattern"] = {key: 8}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    model, _ = load(tiny_checkpoint())
    start = time.monotonic()
    with pytest.raises(RequestError, match="alpha_pattern has the key") as caught:
        load_adapter(model, tmp_path / "peft")
    assert "\n" not in str(caught.value) and time.monotonic() - start < 60

"""An adapter fused into its base: the same model as a package without an adapter, complete or absent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import load
from phi4_mlx.adapters.folder import Adapter, write_folder
from phi4_mlx.adapters.layers import adapter_layers, add_adapter
from phi4_mlx.adapters.linear import DoRALinear
from phi4_mlx.convert import weights
from phi4_mlx.convert.package import convert
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.manifest import verify_manifest
from phi4_mlx.files.safetensors import read_header
from phi4_mlx.lora import effect
from phi4_mlx.lora.fuse import fuse
from tests.adapters import save_adapter
from tests.tiny_sambay import write_tiny_sambay

Checkpoint = Callable[..., Path]
IDS = mx.random.randint(0, 512, (1, 90), key=mx.random.key(9))  # crosses the boundary
SMALL_BLOCK = 5000  # bytes: a matrix of the tiny models goes through in several
FOUR_BITS: dict[str, Any] = {"quantize": True, "q_group_size": 32}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", SMALL_BLOCK)


def train_adapter(base: Path, folder: Path, kind: str = "lora", size: float = 0.1, **options: Any) -> Path:
    """Saves an adapter for a base; unlike a fresh one, it changes the output."""
    model, _ = load(base)
    add_adapter(model, **{"rank": 4, "scale": 2.0, "kind": kind} | options)
    for n, layer in enumerate(adapter_layers(model).values()):
        layer.lora_b = size * mx.random.normal(layer.lora_b.shape, key=mx.random.key(n))
        if isinstance(layer, DoRALinear):
            layer.m = layer.m * (1 + 0.3 * mx.random.normal(layer.m.shape, key=mx.random.key(n)))
    save_adapter(model, folder, {})
    return folder


def difference(a: Path, b: Path, adapter: Path | None = None) -> float:
    """Largest difference of a logit between a package and a base with its adapter on."""
    return mx.abs(load(a)[0](IDS) - load(b, adapter_path=adapter)[0](IDS)).max().item()


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("shards", [1, 3])
def test_fused_is_the_same_as_the_adapter_on(
    tiny_checkpoint: Checkpoint, tmp_path: Path, kind: str, shards: int
) -> None:
    base = tiny_checkpoint(shards=shards, num_hidden_layers=3)
    adapter = train_adapter(base, tmp_path / "adapter", kind, num_layers=2)
    fused = fuse(base, adapter, tmp_path / "out")
    assert difference(tmp_path / "out", base, adapter) < 1e-4
    assert difference(tmp_path / "out", base) > 0.1
    assert len(fused.schemes) == 8 and fused.error == 0 and fused.change > 0.01
    assert fused.effect.keeps and fused.effect.as_adapter == fused.effect.changed > 0 and not fused.effect.own
    verify_manifest(tmp_path / "out")


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("mode", [{"q_group_size": 32}, {"q_mode": "mxfp4"}, {"q_mode": "nvfp4"}])
def test_a_quantised_base_can_be_fused_to_a_dense_package(
    tiny_checkpoint: Checkpoint, tmp_path: Path, kind: str, mode: dict[str, Any]
) -> None:
    convert(tiny_checkpoint(), tmp_path / "base", quantize=True, **mode)
    adapter = train_adapter(tmp_path / "base", tmp_path / "adapter", kind)
    fused = fuse(tmp_path / "base", adapter, tmp_path / "out", dequantize=True)
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert fused.error == 0
    # An embedding in one of the mx modes makes bf16 of the whole model, so that its logits are good to 1 % only.
    assert difference(tmp_path / "out", tmp_path / "base", adapter) < (0.1 if "q_mode" in mode else 1e-4)
    assert difference(tmp_path / "out", tmp_path / "base") > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_hybrid_is_fused_block_by_block(tmp_path: Path, kind: str) -> None:
    convert(write_tiny_sambay(tmp_path / "hybrid"), tmp_path / "base", **FOUR_BITS)
    adapter = train_adapter(tmp_path / "base", tmp_path / "adapter", kind)
    fused = fuse(tmp_path / "base", adapter, tmp_path / "out", dequantize=True)
    assert len(fused.schemes) == 32 and fused.effect.keeps
    assert difference(tmp_path / "out", tmp_path / "base", adapter) < 1e-3
    assert difference(tmp_path / "out", tmp_path / "base") > 0.1


def test_weights_in_float32_stay_so_in_a_model_of_bfloat16(tmp_path: Path) -> None:
    base = write_tiny_sambay(tmp_path / "base")
    weights = mx.load(str(base / "model.safetensors"))
    exact = {name: array for name, array in weights.items() if "A_log" in name or "lambda_" in name}
    half = {name: array.astype(mx.bfloat16) for name, array in weights.items()} | exact
    mx.save_safetensors(str(base / "model.safetensors"), half)
    fuse(base, train_adapter(base, tmp_path / "adapter", num_layers=3, keys=["mlp.fc2"]), tmp_path / "out")
    fused = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {name: array.dtype for name, array in fused.items()} == {name: array.dtype for name, array in half.items()}
    changed = {name for name in half if not mx.array_equal(half[name], fused[name])}
    assert changed == {f"model.layers.{n}.mlp.fc2.weight" for n in (5, 6, 7)}


@pytest.mark.slow
def test_a_quantised_base_is_quantised_again_each_layer_as_it_was(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    convert(tiny_checkpoint(dtype=mx.bfloat16), tmp_path / "base", **FOUR_BITS, embed_bits=8)
    adapter = train_adapter(tmp_path / "base", tmp_path / "adapter", size=1.0, keys=["mlp.down_proj"])
    fuse(tmp_path / "base", adapter, tmp_path / "out")
    base, out = (
        {n: mx.load(str(tmp_path / p / "model.safetensors"))[n] for n in _names(tmp_path / p)} for p in ("base", "out")
    )
    assert {n: (i.dtype, i.shape) for n, i in read_header(tmp_path / "out" / "model.safetensors").items()} == {
        n: (i.dtype, i.shape) for n, i in read_header(tmp_path / "base" / "model.safetensors").items()
    }
    changed = {name for name in base if not mx.array_equal(base[name], out[name])}
    assert changed == {
        f"model.layers.{n}.mlp.down_proj.{part}" for n in (0, 1) for part in ("weight", "scales", "biases")
    }
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "base" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def _names(folder: Path) -> list[str]:
    return list(read_header(folder / "model.safetensors"))


@pytest.mark.slow
def test_the_loss_that_is_told_is_the_loss_there_is(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Against whole matrices."""
    convert(tiny_checkpoint(), tmp_path / "base", **FOUR_BITS)
    adapter = train_adapter(tmp_path / "base", tmp_path / "adapter")
    fused = fuse(tmp_path / "base", adapter, tmp_path / "out")
    fuse(tmp_path / "base", adapter, tmp_path / "exact", dequantize=True)
    convert(tmp_path / "out", tmp_path / "back", dequantize=True)
    convert(tmp_path / "base", tmp_path / "before", dequantize=True)
    exact, back, before = (mx.load(str(tmp_path / n / "model.safetensors")) for n in ("exact", "back", "before"))
    names = [name for name in exact if "proj" in name]
    whole = sum(mx.square(exact[name]).sum().item() for name in names)
    error = sum(mx.square(exact[name] - back[name]).sum().item() for name in names)
    change = sum(mx.square(exact[name] - before[name]).sum().item() for name in names)
    assert fused.error == pytest.approx((error / whole) ** 0.5, rel=1e-3) and 0.001 < fused.error < 0.2
    assert fused.change == pytest.approx((change / whole) ** 0.5, rel=1e-3)


def test_a_full_fine_tuning_becomes_a_package(any_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base, tuned = any_checkpoint("base"), any_checkpoint("tuned", seed=1)
    model, _ = load(tuned)
    save_adapter(model.unfreeze(), tmp_path / "adapter", {})
    fuse(base, tmp_path / "adapter", tmp_path / "out")
    assert difference(tmp_path / "out", tuned) == 0


@pytest.mark.slow
def test_matrices_that_would_lose_the_adapter_get_more_bits(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than keep it; the map of config.json names them, and mlx-lm loads the package with equal logits."""
    from mlx_lm.utils import load_model

    convert(tiny_checkpoint(max_position_embeddings=1024), tmp_path / "base", **FOUR_BITS)
    adapter = train_adapter(tmp_path / "base", tmp_path / "adapter", size=0.03)
    sizes, errors = [], []
    for share in (0.5, 0.99, 1 - 1e-9):
        monkeypatch.setattr(effect, "KEPT_UNSEEN", share)  # the adapter names no data
        fused = fuse(tmp_path / "base", adapter, tmp_path / str(share))
        assert fused.effect.kept > share - 1e-3
        sizes.append(fused.package_bytes)
        errors.append(difference(tmp_path / str(share), tmp_path / "base", adapter))
        config = json.loads((tmp_path / str(share) / "config.json").read_text())
        bits = {path: scheme.bits for path, scheme in fused.schemes.items() if scheme}
        own = config["quantization"]
        assert bits == {path: own.get(path, own)["bits"] for path in bits}
        assert own == config["quantization_config"]
        theirs, _ = load_model(tmp_path / str(share))
        assert mx.abs(theirs(IDS) - load(tmp_path / str(share))[0](IDS)).max() < 1e-4
        verify_manifest(tmp_path / str(share))
    assert fused.base_bytes <= sizes[0] < sizes[1] < sizes[2] and errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_matrices_of_other_modes_get_more_bits_too(tiny_checkpoint: Checkpoint, tmp_path: Path, mode: str) -> None:
    convert(tiny_checkpoint(), tmp_path / "base", quantize=True, q_mode=mode)
    adapter = train_adapter(tmp_path / "base", tmp_path / "adapter", size=0.01)
    fused = fuse(tmp_path / "base", adapter, tmp_path / "out")
    assert fused.raised and fused.package_bytes > fused.base_bytes
    assert all(scheme is None or scheme.mode in ("affine", mode) for scheme in fused.schemes.values())
    assert load(tmp_path / "out", verify=True)[0](IDS).shape == (1, 90, 512)


def test_an_adapter_on_the_head_is_fused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    convert(tiny_checkpoint(tie_word_embeddings=False), tmp_path / "base", **FOUR_BITS)
    a, b = (mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate([(96, 2), (2, 512)]))
    adapter = Adapter("lora", 1.0, 0.0, {"lm_head.lora_a": 0.1 * a, "lm_head.lora_b": b}, "head")
    write_folder(tmp_path / "adapter", adapter, 2)
    fused = fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert list(fused.schemes) == ["lm_head"] and fused.effect.keeps
    assert difference(tmp_path / "out", tmp_path / "base") > difference(
        tmp_path / "out", tmp_path / "base", tmp_path / "adapter"
    )


def test_mlx_lm_loads_a_fused_package(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    base = tiny_checkpoint(max_position_embeddings=1024)
    fuse(base, train_adapter(base, tmp_path / "adapter"), tmp_path / "out")
    theirs, _ = load_model(tmp_path / "out")
    assert mx.abs(theirs(IDS) - load(tmp_path / "out")[0](IDS)).max() < 1e-4


def test_what_cannot_be_fused_leaves_nothing(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint("base")
    adapter = train_adapter(base, tmp_path / "adapter")
    other = train_adapter(tiny_checkpoint("other", num_hidden_layers=3), tmp_path / "other_adapter")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"layers\.2.*adapter is for another model"):
        fuse(base, other, tmp_path / "out")
    with pytest.raises(RequestError, match="base is not quantised; drop --dequantize"):
        fuse(base, adapter, tmp_path / "out", dequantize=True)
    with pytest.raises(RequestError, match="already exists"):
        fuse(base, adapter, adapter)
    with pytest.raises(CheckpointError, match="holds no adapter_config"):
        fuse(base, base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (adapter / "adapters.safetensors").write_bytes((adapter / "adapters.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        fuse(base, adapter, tmp_path / "out")

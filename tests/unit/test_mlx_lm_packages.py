"""Packages that mlx-lm makes: its modes, its mixed recipes, the outputs of its quantisers; loaded with its logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from phi4_mlx import load
from phi4_mlx.convert.package import convert
from phi4_mlx.errors import CheckpointError, ConfigError
from tests.conftest import TinyCheckpoint

# Past the boundary of LongRoPE, where mlx-lm's single table is the right one.
IDS = mx.random.randint(0, 512, (1, 70), key=mx.random.key(1))
# Groups of 128 divide the rows of every matrix.
SHAPES = {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "torch_dtype": "float32",
}  # fmt: skip
PLAIN = {"rope_scaling": None, "original_max_position_embeddings": 4096}
DOWN, OUT = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"

Package = Callable[..., Path]


@pytest.fixture
def converted(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Package:
    """`converted(options of mlx_lm.convert, **config)` -> the package that mlx-lm makes of a tiny checkpoint."""
    from mlx_lm.convert import convert as theirs

    def make(options: dict[str, Any], **config: Any) -> Path:
        source = tiny_checkpoint("source", **SHAPES | config)
        theirs(str(source), str(tmp_path / "package"), quantize=True, **options)
        return tmp_path / "package"

    return make


def check(folder: Path) -> None:
    """Checks that both loaders compute the same logits, and that our converter's copy does too."""
    from mlx_lm.utils import load_model

    ours, _ = load(folder)
    theirs, _ = load_model(folder)
    assert mx.abs(ours(IDS) - theirs(IDS)).max() < 1e-4
    convert(folder, folder.parent / "copy")
    assert mx.array_equal(load(folder.parent / "copy")[0](IDS), ours(IDS))
    shutil.rmtree(folder.parent / "copy")


def remap(folder: Path, change: Callable[[dict[str, Any]], Any], names: str = "both") -> Path:
    """Changes the quantisation in config.json, under one of its two names or both."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    settings = raw.pop("quantization")
    change(settings)
    raw["quantization_config"] = settings
    if names == "both":
        raw["quantization"] = settings
    path.write_text(json.dumps(raw))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
@pytest.mark.parametrize("tied", [True, False])
def test_its_mixed_recipes(converted: Package, recipe: str, tied: bool) -> None:
    """Without --q-group-size they write group_size null."""
    folder = converted({"quant_predicate": recipe}, tie_word_embeddings=tied)
    assert json.loads((folder / "config.json").read_text())["quantization"][DOWN]["group_size"] is None
    check(folder)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_affine_at_every_width(converted: Package, bits: int, group_size: int) -> None:
    check(converted({"q_bits": bits, "q_group_size": group_size}))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("config", [PLAIN, PLAIN | {"tie_word_embeddings": False}, {"partial_rotary_factor": 1.0}])
def test_its_other_modes(converted: Package, mode: str, config: dict[str, Any]) -> None:
    check(converted({"q_mode": mode}, **config))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_its_other_modes_with_a_dense_embedding(converted: Package, mode: str) -> None:
    """A quantised embedding of these modes gives bfloat16, in which the two scale partly rotated queries otherwise."""
    check(converted({"q_mode": mode, "quant_predicate": lambda path, module: "embed" not in path}))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("own", [{"bits": 8, "group_size": 64}, {"bits": 6}, {"mode": "mxfp8"}, {"group_size": None}])
def test_a_layer_without_a_mode_is_affine_in_every_package(converted: Package, mode: str, own: dict[str, Any]) -> None:
    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return dict(own) if "o_proj" in path else "down_proj" not in path

    folder = converted({"q_mode": mode, "quant_predicate": predicate}, **PLAIN)
    check(folder)
    layer = load(folder)[0].layers[1]
    assert layer.self_attn.o_proj.mode == own.get("mode", "affine")
    assert layer.self_attn.o_proj.bits == own.get("bits", 8 if "mode" in own else 4)
    assert isinstance(layer.mlp.down_proj, nn.Linear)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda settings: settings.pop(OUT),  # mlx-lm infers these from the shapes
        lambda settings: settings.update({DOWN: False}),
        lambda settings: settings.update(bits=None, group_size=None),
        lambda settings: settings.pop("mode"),
        lambda settings: settings.update({"lm_head": False, "model.layers.7.mlp.down_proj": {"bits": 3}}),
    ],
)
@pytest.mark.parametrize("names", ["both", "quantization_config"])
def test_a_layer_that_the_map_does_not_name_is_read_from_its_shapes(
    converted: Package, change: Callable[[dict[str, Any]], Any], names: str
) -> None:
    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return {"bits": 8, "group_size": 32} if path == OUT else path != DOWN

    folder = converted({"quant_predicate": predicate})
    expected = load(folder)[0](IDS)
    remap(folder, change, names)
    assert mx.array_equal(load(folder)[0](IDS), expected)
    if names == "both":
        check(folder)


@pytest.mark.slow
def test_a_layer_in_other_bits_than_the_map_says_is_read_from_its_shapes(converted: Package) -> None:
    folder = converted({"quant_predicate": "mixed_3_6"})
    expected = load(folder)[0](IDS)
    names = [name.removesuffix(".scales") for name in mx.load(str(folder / "model.safetensors")) if "scales" in name]
    for own in ({"bits": 5, "group_size": 32}, {"mode": "nvfp4"}, False, True):
        remap(folder, lambda settings, own=own: settings.update(dict.fromkeys(names, own)))  # type: ignore[misc]
        assert mx.array_equal(load(folder)[0](IDS), expected)


@pytest.mark.slow
def test_what_its_gptq_writes(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    from mlx_lm.quant.gptq import gptq_quantize
    from mlx_lm.utils import load as load_theirs
    from mlx_lm.utils import save

    source = tiny_checkpoint("source", **SHAPES)
    model, tokenizer, config = load_theirs(str(source), return_config=True)
    data = mx.random.randint(0, 512, (8, 16), key=mx.random.key(2))
    model, config["quantization"] = gptq_quantize(model, data, 4, 64, 6, 32)
    save(tmp_path / "package", str(source), model, tokenizer, config)
    check(tmp_path / "package")


@pytest.mark.slow
def test_what_its_dynamic_quantiser_writes(converted: Package) -> None:
    """Its overrides have bits and group_size alone, and name no mode."""
    sensitive = {DOWN, "model.embed_tokens"}
    folder = converted(
        {"quant_predicate": lambda path, module: {"bits": 5, "group_size": 64} if path in sensitive else True}
    )
    check(folder)
    assert load(folder)[0].head.bits == 5


def shapes(folder: Path, **tensors: mx.array) -> Path:
    """Replaces tensors of a package: name (with __ for each dot) -> array."""
    path = folder / "model.safetensors"
    kept = dict(mx.load(str(path)))
    mx.eval(kept)
    mx.save_safetensors(str(path), kept | {name.replace("__", "."): array for name, array in tensors.items()})
    return folder


def package(tiny_checkpoint: TinyCheckpoint, **config: Any) -> Path:
    """A package in 4 bits."""
    source = tiny_checkpoint("source", **SHAPES | config)
    convert(source, source.parent / "package", quantize=True)
    return source.parent / "package"


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": mx.zeros((128, 12), mx.uint32), "scales": mx.zeros((128, 3))},  # groups of 42
        {"weight": mx.zeros((128, 28), mx.uint32)},  # 7 bits
        {"weight": mx.zeros((128, 16), mx.uint32), "scales": mx.zeros((128, 2), mx.uint8)},  # no mode has groups of 64
        {"scales": mx.zeros((128, 16))},  # groups of 8
        {"scales": mx.zeros((2, 128))},
        {"scales": mx.zeros(())},
        {"scales": mx.zeros((128, 0))},
        {"weight": mx.zeros((128, 128))},  # dense, with scales
    ],
)
def test_shapes_of_no_quantisation_are_refused_by_name(
    tiny_checkpoint: TinyCheckpoint, tensors: dict[str, mx.array]
) -> None:
    folder = package(tiny_checkpoint)
    shapes(folder, **{f"{OUT}.{name}": array for name, array in tensors.items()})
    with pytest.raises(CheckpointError, match=rf"{OUT} is quantised in a way that does not fit: weight .*\[128, 128\]"):
        load(folder)


@pytest.mark.parametrize("missing", ["weight", "biases"])
def test_a_quantised_layer_that_lacks_a_tensor_is_refused_by_name(
    tiny_checkpoint: TinyCheckpoint, missing: str
) -> None:
    folder = package(tiny_checkpoint)
    path = folder / "model.safetensors"
    kept = {name: array for name, array in mx.load(str(path)).items() if name != f"{OUT}.{missing}"}
    mx.eval(kept)
    mx.save_safetensors(str(path), kept)
    with pytest.raises(CheckpointError, match=rf"{OUT}\.(weight|biases|scales)"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "int4"}, r"mode 'int4'; known are affine, mxfp4, nvfp4, mxfp8"),
        ({"mode": ["affine"]}, r"mode \['affine'\]"),
        ({"mode": None}, r"mode None"),
        ({"bits": 4.5}, "bits must be a whole number"),
        ({"group_size": True}, "group_size must be a whole number"),
        ({OUT: {"bits": "4"}}, "bits must be a whole number"),
        ({OUT: {"mode": "int4"}}, rf"quantization of {OUT} has mode 'int4'"),
        ({OUT: {"quantize_input": True, "mode": "nvfp4"}}, rf"quantization of {OUT} must be true, false or an object"),
        ({OUT: 4}, rf"quantization of {OUT} must be true, false or an object"),
        ({OUT: None}, rf"quantization of {OUT} must be true, false or an object"),
        ({"quant_method": "awq"}, "'awq' is not supported; convert the unquantised checkpoint"),
    ],
)
def test_settings_that_nothing_computes_are_refused_by_name(
    tiny_checkpoint: TinyCheckpoint, settings: dict[str, Any], message: str
) -> None:
    folder = remap(package(tiny_checkpoint), lambda found: found.update(settings))
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_quantised_activations_are_refused_by_name(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(ConfigError, match="quantize_activations = True is not supported"):
        load(tiny_checkpoint(quantize_activations=True))


def test_every_tensor_of_a_package_is_in_the_model(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = package(tiny_checkpoint)
    stored = mx.load(str(folder / "model.safetensors"))
    loaded = dict(tree_flatten(load(folder)[0].parameters()))
    assert stored.keys() == loaded.keys() and all(mx.array_equal(stored[name], loaded[name]) for name in stored)

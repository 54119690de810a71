"""Allowed combinations of mode, bits and group size, their names in config.json, and their sizes in bytes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.config.fields import QUANTIZATION_MODES
from phi4_mlx.convert.package import SHARD_BYTES
from phi4_mlx.convert.quantize import Scheme, make_recipe, quantization_config
from phi4_mlx.convert.weights import Parameter, plan, shards
from phi4_mlx.errors import RequestError
from phi4_mlx.files.dtypes import name_of
from phi4_mlx.files.safetensors import TensorWriter, read_header, tensor_bytes
from phi4_mlx.models.text import Model
from tests.presets import PRESETS


@pytest.mark.parametrize("mode", QUANTIZATION_MODES)
def test_mlx_supports_every_combination_in_the_planned_layout(mode: str) -> None:
    weight = mx.random.normal((4, 256)).astype(mx.bfloat16)
    for bits, group_size in itertools.product(*QUANTIZATION_MODES[mode]):
        recipe = make_recipe(mode, bits, group_size, None)
        packed = mx.quantize(weight, **vars(recipe.scheme))
        layout = recipe.scheme.layout("a.b", "BF16", weight.shape)
        assert list(layout.values()) == [(name_of(part.dtype), part.shape) for part in packed]
        assert list(layout) == ["a.b.weight", "a.b.scales", "a.b.biases"][: len(packed)]
        mx.eval(mx.dequantize(*packed, **vars(recipe.scheme)))


def test_defaults_depend_on_the_mode() -> None:
    assert make_recipe("affine", None, None, None).scheme == Scheme("affine", 4, 64)
    assert make_recipe("mxfp4", None, None, None).scheme == Scheme("mxfp4", 4, 32)
    assert make_recipe("nvfp4", None, None, None).scheme == Scheme("nvfp4", 4, 16)
    assert make_recipe("mxfp8", None, None, None).scheme == Scheme("mxfp8", 8, 32)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        (("q4_k_m", None, None, None), "--q-mode 'q4_k_m' is not known"),
        (("affine", 7, None, None), "--q-bits 7 .* 2, 3, 4, 5, 6, 8"),
        (("affine", 4, 48, None), "--q-group-size 48 .* 32, 64, 128"),
        (("affine", 4, 64, 16), "--embed-bits 16"),
        (("mxfp4", 4, 32, 6), "--embed-bits 6"),
        (("mxfp4", 4, 64, None), "--q-group-size 64 does not go with --q-mode mxfp4"),
    ],
)
def test_an_unsupported_choice_is_refused_with_the_supported_ones(choice: tuple, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        make_recipe(*choice)


def test_groups_that_do_not_divide_the_rows_are_refused_with_those_that_do() -> None:
    with pytest.raises(RequestError, match=r"up.weight has rows of 96, .* 64 .*; --q-group-size 32 would"):
        Scheme("affine", 4, 64).layout("up", "F16", (8, 96))
    with pytest.raises(RequestError, match="leave out -q"):
        Scheme("mxfp4", 4, 32).layout("up", "F16", (8, 100))


def test_the_recipe_may_keep_the_embedding_and_the_head_finer() -> None:
    recipe = make_recipe("affine", 4, 64, 6)
    fine, coarse = Scheme("affine", 6, 64), Scheme("affine", 4, 64)
    assert recipe.scheme_of("model.embed_tokens") == recipe.scheme_of("lm_head") == fine
    assert recipe.scheme_of("model.layers.0.self_attn.o_proj") == coarse


def test_config_names_the_commonest_scheme_and_the_others_by_path() -> None:
    fine, coarse = Scheme("affine", 6, 64), Scheme("affine", 4, 64)
    plain = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert quantization_config({"a": coarse, "b": coarse}) == plain
    found = quantization_config({"model.embed_tokens": fine, "a": coarse, "b": coarse})
    assert found == plain | {"model.embed_tokens": {"group_size": 64, "bits": 6, "mode": "affine"}}


# --- the true shapes, without weights ---


def hollow_checkpoint(folder: Path, preset: str) -> Path:
    """A bf16 checkpoint with the true names and shapes, its numbers a hole in a sparse file."""
    folder.mkdir()
    config = PRESETS[preset]
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    shapes = tree_flatten(Model(config).parameters())
    hollow_file(folder / "model.safetensors", {name: ("BF16", array.shape) for name, array in shapes})
    return folder


def hollow_file(path: Path, layout: dict) -> int:
    """Writes a header and a hole of the size of the numbers; returns the size of the file."""
    with contextlib.suppress(InterruptedError), TensorWriter(path, layout):
        raise InterruptedError  # leaves the file with its header alone
    header = path.stat().st_size
    os.truncate(path, header + sum(tensor_bytes(dtype, shape) for dtype, shape in layout.values()))
    return path.stat().st_size


def planned(folder: Path, preset: str, *choice: object) -> list[Parameter]:
    recipe = make_recipe(*choice) if choice else None  # type: ignore[arg-type]
    return plan(hollow_checkpoint(folder, preset), PRESETS[preset], recipe, None, False)


def test_phi_4_mini_at_four_bits_has_the_size_and_the_tensors_of_the_published_package(tmp_path: Path) -> None:
    parameters = planned(tmp_path / "m", "phi-4-mini", "affine", 4, 64, None)
    layout = {name: kind for parameter in parameters for name, kind in parameter.outputs.items()}
    assert len(layout) == 452
    assert sum(parameter.input_bytes for parameter in parameters) == 2 * 3_836_021_760
    matrices, norms = 3_835_822_080, 199_680
    assert matrices + norms == 3_836_021_760
    assert sum(parameter.output_bytes for parameter in parameters) == matrices * 9 // 16 + norms * 2  # 4.5 bits
    assert str(hollow_file(tmp_path / "out", layout)).startswith("2158")
    assert 2_158_100_000 <= (tmp_path / "out").stat().st_size < 2_158_200_000
    assert layout["model.embed_tokens.weight"] == ("U32", (200064, 384))
    assert layout["model.embed_tokens.scales"] == layout["model.embed_tokens.biases"] == ("BF16", (200064, 48))
    layer = "model.layers.31."
    for path, rows, words, groups in (
        ("self_attn.qkv_proj", 5120, 384, 48),
        ("self_attn.o_proj", 3072, 384, 48),
        ("mlp.gate_up_proj", 16384, 384, 48),
        ("mlp.down_proj", 3072, 1024, 128),
    ):
        assert layout[f"{layer}{path}.weight"] == ("U32", (rows, words))
        assert layout[f"{layer}{path}.scales"] == layout[f"{layer}{path}.biases"] == ("BF16", (rows, groups))
    assert layout["model.norm.weight"] == ("BF16", (3072,))
    assert "lm_head.weight" not in layout
    assert read_header(tmp_path / "out").keys() == layout.keys()


@pytest.mark.parametrize(
    ("choice", "size"),
    [
        (("affine", 4, 64, 6), 2_158_049_280 + 200064 * 3072 // 4),  # two more bits per number of the embedding
        (("affine", 4, 32, None), 3_835_822_080 * 5 // 8 + 399_360),
        (("affine", 8, 64, None), 3_835_822_080 * 17 // 16 + 399_360),
        (("mxfp4", None, None, None), 3_835_822_080 * 17 // 32 + 399_360),
        (("nvfp4", None, None, None), 3_835_822_080 * 9 // 16 + 399_360),
        (("mxfp8", None, None, None), 3_835_822_080 * 33 // 32 + 399_360),
    ],
)
def test_sizes_of_phi_4_mini_in_other_recipes(choice: tuple, size: int, tmp_path: Path) -> None:
    parameters = planned(tmp_path / "m", "phi-4-mini", *choice)
    assert sum(parameter.output_bytes for parameter in parameters) == size


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_size_of_the_family_can_be_planned(preset: str, tmp_path: Path) -> None:
    parameters = planned(tmp_path / "m", preset, "affine", 4, 64, 8)
    tied = PRESETS[preset].tie_word_embeddings
    finer = [parameter.path for parameter in parameters if parameter.target == Scheme("affine", 8, 64)]
    assert finer == ["model.embed_tokens"] + ([] if tied else ["lm_head"])
    names = dict(tree_flatten(nn_quantized(preset).parameters()))
    assert {name: shape for p in parameters for name, (_, shape) in p.outputs.items()} == {
        name: array.shape for name, array in names.items()
    }


def nn_quantized(preset: str) -> nn.Module:
    """The model after mlx's own `quantize`; lazy, nothing is computed."""
    model = Model(PRESETS[preset])

    def recipe(path: str, module: nn.Module) -> bool | dict:
        if not hasattr(module, "to_quantized"):
            return False
        return {"group_size": 64, "bits": 8 if path in ("model.embed_tokens", "lm_head") else 4}

    nn.quantize(model, class_predicate=recipe)
    return model


def test_shards_stay_under_five_gigabytes(tmp_path: Path) -> None:
    parts = shards(planned(tmp_path / "m", "phi-4-mini"), SHARD_BYTES)
    assert len(parts) == 2
    for number, part in enumerate(parts):
        layout = {name: kind for parameter in part for name, kind in parameter.outputs.items()}
        assert hollow_file(tmp_path / str(number), layout) <= 5 * 10**9
    assert sum(map(len, parts)) == 32 * 6 + 2


def test_shards_are_as_full_as_their_limit_allows(tmp_path: Path) -> None:
    parameters = planned(tmp_path / "m", "phi-4-mini")
    sizes = [sum(parameter.output_bytes for parameter in part) for part in shards(parameters, 2 * 10**9)]
    assert len(sizes) == 4 and all(size <= 2 * 10**9 for size in sizes)
    assert sum(sizes) == 2 * 3_836_021_760


def test_a_parameter_larger_than_a_shard_has_one_to_itself(tmp_path: Path) -> None:
    parameters = planned(tmp_path / "m", "phi-4-mini")[:4]
    assert [len(part) for part in shards(parameters, 10**6)] == [1, 1, 1, 1]
    assert shards([], 10**6) == []

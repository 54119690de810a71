"""Packages of Phi-4-multimodal: their files, sizes and errors, from every layout and back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx import load
from phi4_mlx.adapters.layers import read_adapter
from phi4_mlx.checkpoint import load_config
from phi4_mlx.convert.loras import lora_bytes, plan_loras
from phi4_mlx.convert.package import convert
from phi4_mlx.convert.quantize import Scheme, make_recipe
from phi4_mlx.convert.weights import plan
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.manifest import verify_manifest
from phi4_mlx.files.safetensors import TOWERS_FILE, read_header
from phi4_mlx.lora.fuse import fuse
from phi4_mlx.models.multimodal import Model
from phi4_mlx.models.padded import PaddedLinear, PaddedQuantizedLinear, attention
from phi4_mlx.tokens.media.audio import Audio
from phi4_mlx.tokens.media.image import Image
from tests.adapters import adapted, save_adapter
from tests.conformance import recipe_multimodal as recipe
from tests.conftest import TinyCheckpoint
from tests.multimodal_shapes import write_published_shapes
from tests.tiny_multimodal import LAYOUTS, write_tiny_multimodal

FILES = ["model.safetensors", "speech-lora/adapters.safetensors", TOWERS_FILE, "vision-lora/adapters.safetensors"]
QUANTIZE: dict[str, Any] = {"quantize": True, "q_group_size": 32}  # 64 does not divide the tiny model's width


def weights(folder: Path) -> dict[str, bytes]:
    """The tensor files of a package by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def logits(folder: Path, mode: str = "vision_speech") -> np.ndarray:
    """Logits of the recipe's prompt in a mode."""
    model, _ = load(folder)
    image = Image(*recipe.picture(), recipe.CROP, recipe.PATCH)
    clip = Audio(recipe.features("short"), 0.83)
    media = [*([image] if "vision" in mode else []), *([clip] if "speech" in mode else [])]
    return np.array(model(mx.array([recipe.prompt(mode)]), media=media))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


def test_every_layout_gives_the_same_package(tmp_path: Path) -> None:
    made = []
    for layout in LAYOUTS[:3]:
        convert(write_tiny_multimodal(tmp_path / layout, layout=layout), tmp_path / f"{layout}-package", **QUANTIZE)
        made.append(weights(tmp_path / f"{layout}-package"))
    assert sorted(made[0]) == FILES
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("mode", recipe.MODES)
def test_a_dense_package_computes_as_its_checkpoint(tmp_path: Path, mode: str) -> None:
    source = write_tiny_multimodal(tmp_path / "source")
    convert(source, tmp_path / "package")
    assert sorted(weights(tmp_path / "package")) == FILES
    assert np.array_equal(logits(tmp_path / "package", mode), logits(source, mode))


def test_a_checkpoint_without_loras_gives_a_package_without(tmp_path: Path) -> None:
    convert(write_tiny_multimodal(tmp_path / "source", layout="base"), tmp_path / "package", **QUANTIZE)
    assert sorted(weights(tmp_path / "package")) == ["model.safetensors", TOWERS_FILE]


def test_the_defaults_are_4_bits_for_the_base_and_8_for_towers_and_loras(tmp_path: Path) -> None:
    convert(write_tiny_multimodal(tmp_path / "source"), tmp_path / "package", **QUANTIZE)
    config = load_config(tmp_path / "package").to_dict()["quantization"]
    fc2 = f"{recipe.EXTEND}image_embed.img_processor.encoder.layers.0.mlp.fc2"
    assert {name: config[name] for name in ("bits", "group_size", "mode")} == asdict(Scheme("affine", 4, 32))
    assert config[fc2] == asdict(Scheme("affine", 8, 64))
    for name in recipe.RANKS:
        settings = json.loads((tmp_path / "package" / f"{name}-lora" / "adapter_config.json").read_text())
        assert settings["quantization"] == {"bits": 8, "group_size": 32}
    model, _ = load(tmp_path / "package", verify=True)
    assert isinstance(model, Model)
    assert isinstance(model.vision.img_processor.encoder.layers[0].mlp.fc2, PaddedQuantizedLinear)


@pytest.mark.parametrize(("tower_bits", "adapter_bits"), [(16, 4), (4, 16)])
def test_towers_and_loras_have_bits_of_their_own(tmp_path: Path, tower_bits: int, adapter_bits: int) -> None:
    source = write_tiny_multimodal(tmp_path / "source")
    convert(source, tmp_path / "package", **QUANTIZE, tower_bits=tower_bits, adapter_bits=adapter_bits)
    convert(source, tmp_path / "dense")
    ours, dense = weights(tmp_path / "package"), weights(tmp_path / "dense")
    assert (ours[TOWERS_FILE] == dense[TOWERS_FILE]) == (tower_bits == 16)
    lora = "vision-lora/adapters.safetensors"
    assert (ours[lora] == dense[lora]) == (adapter_bits == 16)
    assert ours["model.safetensors"] != dense["model.safetensors"]
    load(tmp_path / "package", verify=True)


def test_a_package_is_dequantised_and_quantised_again(tmp_path: Path) -> None:
    """Dequantised numbers are those that the package stands for, without the padding; the same bits hold them again."""
    convert(write_tiny_multimodal(tmp_path / "source"), tmp_path / "package", **QUANTIZE)
    convert(tmp_path / "package", tmp_path / "dense", dequantize=True)
    convert(tmp_path / "package", tmp_path / "again", **QUANTIZE, dequantize=True)
    expected = logits(tmp_path / "package")
    for name, error in (("dense", 1e-5), ("again", 0.02)):
        assert relative_error(logits(tmp_path / name), expected) < error
    shapes = {name: info.shape for name, info in read_header(tmp_path / "dense" / TOWERS_FILE).items()}
    assert shapes[f"{recipe.EXTEND}image_embed.img_processor.encoder.layers.0.mlp.fc2.weight"] == (32, 48)
    assert not any(
        "scales" in name for path in (tmp_path / "dense").rglob("*.safetensors") for name in read_header(path)
    )
    convert(tmp_path / "package", tmp_path / "copy")
    assert weights(tmp_path / "copy") == weights(tmp_path / "package")
    with pytest.raises(RequestError, match="quantised already"):
        convert(tmp_path / "package", tmp_path / "twice", **QUANTIZE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_file_has_the_dtype_that_is_asked_for(tmp_path: Path, dtype: str) -> None:
    convert(write_tiny_multimodal(tmp_path / "source"), tmp_path / "package", **QUANTIZE, dtype=dtype)
    found = {
        info.dtype for path in (tmp_path / "package").rglob("*.safetensors") for info in read_header(path).values()
    }
    assert found == {"U32", {"bfloat16": "BF16", "float16": "F16"}[dtype]}


@pytest.mark.parametrize("name", ["vision-lora/adapters.safetensors", "speech-lora/adapter_config.json", TOWERS_FILE])
def test_the_manifest_covers_towers_and_loras(tmp_path: Path, name: str) -> None:
    convert(write_tiny_multimodal(tmp_path / "source"), tmp_path / "package")
    verify_manifest(tmp_path / "package")
    path = tmp_path / "package" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="SHA-256"):
        verify_manifest(tmp_path / "package")
    path.write_bytes(whole)
    (path.parent / "other.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"other\.safetensors is not in manifest"):
        verify_manifest(tmp_path / "package")


@pytest.mark.parametrize("option", ["tower_bits", "adapter_bits"])
def test_bits_that_cannot_be_are_refused(tmp_path: Path, tiny_checkpoint: TinyCheckpoint, option: str) -> None:
    flag = f"--{option.replace('_', '-')}"
    source = write_tiny_multimodal(tmp_path / "source")
    for bits in (7, 1, 0, 32, "8"):
        with pytest.raises(RequestError, match=f"{flag} .*must be one of 2, 3, 4, 5, 6, 8, 16"):
            convert(source, tmp_path / "out", **QUANTIZE, **{option: bits})
    with pytest.raises(RequestError, match=f"{flag} 8 does nothing without -q"):
        convert(source, tmp_path / "out", **{option: 8})
    with pytest.raises(RequestError, match=f"{flag} 8 is for multimodal models"):
        convert(tiny_checkpoint(), tmp_path / "out", **QUANTIZE, **{option: 8})
    assert not (tmp_path / "out").exists()


def test_a_lora_with_nan_is_refused(tmp_path: Path) -> None:
    source = write_tiny_multimodal(tmp_path / "source", layout="native")
    path = source / "speech-lora" / "adapter_model.safetensors"
    tensors = dict(mx.load(str(path)))
    name = next(name for name in tensors if "lora_A" in name)
    mx.eval(tensors)
    mx.save_safetensors(str(path), {**tensors, name: tensors[name] * float("nan")})
    with pytest.raises(CheckpointError, match="NaN"):
        convert(source, tmp_path / "package", **QUANTIZE)
    assert not (tmp_path / "package").exists()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published_shapes(tmp_path_factory.mktemp("published"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tower_bits", "adapter_bits", "most"), [(None, None, 4.10e9), (16, 16, 5.58e9), (4, 4, 3.15e9)]
)
def test_a_package_of_the_published_shapes_fits(
    published: Path, tower_bits: int | None, adapter_bits: int | None, most: float
) -> None:
    """4.1 GB by default, from the headers alone."""
    config = load_config(published)
    recipe_ = make_recipe("affine", None, None, None, tower_bits, adapter_bits)
    parameters = plan(published, config, recipe_, None, False)
    loras = plan_loras(published, config, recipe_, None, False)
    nbytes = sum(parameter.output_bytes for parameter in parameters) + lora_bytes(loras)
    assert 0.97 * most < nbytes <= most
    padded = [each for each in parameters if each.path.endswith("mlp.fc2") and each.target]
    assert all(each.outputs[f"{each.path}.weight"][1][1] * 32 // each.target.bits == 4352 for each in padded)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.006), (4, 0.1)])
def test_the_error_of_each_choice_on_random_matrices(bits: int, error: float) -> None:
    matrix = mx.random.normal((64, 4352), key=mx.random.key(0))
    found = mx.dequantize(*mx.quantize(matrix, group_size=64, bits=bits), group_size=64, bits=bits)
    assert 0.8 * error < relative_error(np.array(found), np.array(matrix)) <= error


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [48, 64, 100])
def test_padding_a_row_changes_no_output(bits: int, width: int) -> None:
    """A quantised layer of any width computes as the dense one of its dequantised numbers."""
    layer = PaddedLinear(width, 24)
    packed = layer.to_quantized(64, bits)
    numbers = mx.dequantize(packed.weight, packed.scales, packed.biases, group_size=64, bits=bits)
    x = mx.random.normal((3, 5, width))
    assert mx.allclose(packed(x), x @ numbers[:, :width].T + layer.bias, atol=1e-5)
    assert numbers.shape[1] % 64 == 0 and mx.abs(numbers[:, :width] - layer.weight).max() < 0.1


@pytest.mark.parametrize("masked", [False, True])
def test_padding_heads_changes_no_output(masked: bool) -> None:
    queries, keys, values = mx.random.normal((3, 2, 4, 9, 72))
    mask = mx.arange(9)[None, None, None] < mx.array([9, 5])[:, None, None, None] if masked else None
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=72**-0.5, mask=mask)
    assert mx.allclose(attention(queries, keys, values, mask, width=80), expected, atol=1e-6)
    assert mx.allclose(attention(queries, keys, values, mask), expected, atol=1e-6)


@pytest.mark.slow
def test_an_adapter_of_the_decoder_is_fused_and_towers_and_loras_stay(tmp_path: Path) -> None:
    source = write_tiny_multimodal(tmp_path / "source")
    convert(source, tmp_path / "base")
    model, _ = load(tmp_path / "base")
    save_adapter(adapted(model), tmp_path / "adapter", {})
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "fused")
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}
    tuned, _ = load(tmp_path / "base", adapter_path=tmp_path / "adapter")
    ids = mx.array([recipe.prompt("language")])
    assert np.abs(np.array(load(tmp_path / "fused")[0](ids) - tuned(ids))).max() < 1e-3


def test_the_loras_of_a_package_are_adapter_folders(tmp_path: Path) -> None:
    """`read_adapter` reads them, as `lora.export` and `--adapter-path` do."""
    convert(write_tiny_multimodal(tmp_path / "source"), tmp_path / "package", **QUANTIZE)
    for name, rank in recipe.RANKS.items():
        adapter = read_adapter(tmp_path / "package" / f"{name}-lora")
        assert (adapter.rank, adapter.scale, len(adapter.paths)) == (rank, 2.0, 8)

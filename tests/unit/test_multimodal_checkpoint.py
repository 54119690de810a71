"""Checkpoints of Phi-4-multimodal: three layouts, every tensor accounted for, towers and LoRAs read at first use."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phi4_mlx import load
from phi4_mlx.checkpoint import share_weights
from phi4_mlx.convert.package import convert
from phi4_mlx.errors import CheckpointError, ConfigError
from phi4_mlx.files.safetensors import TOWERS_FILE, read_header
from phi4_mlx.fingerprint import base_fingerprint
from phi4_mlx.hub import NEEDED_FILES
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.multimodal import Model
from phi4_mlx.tokens.media.audio import Audio
from phi4_mlx.tokens.media.image import Image
from tests.conformance import recipe_multimodal as recipe
from tests.tiny_multimodal import LAYOUTS, write_tiny_multimodal

EXTEND = recipe.EXTEND
LORA = "model.layers.1.mlp.down_proj.lora_{}.vision.weight"
TEXT = mx.array([recipe.prompt("language")])


def image() -> Image:
    return Image(*recipe.picture(), recipe.CROP, recipe.PATCH)


def with_picture(model: LanguageModel) -> np.ndarray:
    """Logits of the recipe's prompt with a picture."""
    return np.array(model(mx.array([recipe.prompt("vision")]), media=[image()]))


def rewritten(path: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    """Changes the tensors of a file."""
    tensors = dict(mx.load(str(path)))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(path), tensors)


def destroyed(path: Path, chosen: Callable[[str], bool]) -> int:
    """Overwrites tensors of a file with NaN, in place; returns their number."""
    infos = [info for name, info in read_header(path).items() if chosen(name)]
    with path.open("r+b") as file:
        for info in infos:
            file.seek(info.start)
            file.write(b"\xff" * (info.end - info.start))
    return len(infos)


def needed_later(name: str) -> bool:
    return "extend" in name or "lora" in name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loading_and_text_read_neither_towers_nor_loras(tmp_path: Path, layout: str) -> None:
    """Text does not miss towers and LoRAs that are destroyed on the disk after `load`; a picture does."""
    folder = write_tiny_multimodal(tmp_path / "tiny", layout=layout)
    text = load(write_tiny_multimodal(tmp_path / "twin", layout=layout))[0](TEXT)
    model, _ = load(folder)
    assert sum(destroyed(path, needed_later) for path in folder.rglob("*.safetensors")) > 50
    assert mx.array_equal(model(TEXT), text)
    base_fingerprint(model)
    with pytest.raises(CheckpointError, match="NaN"):
        with_picture(model)


@pytest.mark.parametrize("name", [TOWERS_FILE, "vision-lora/adapters.safetensors"])
def test_a_file_that_was_cut_after_loading_is_named_at_its_first_use(tmp_path: Path, name: str) -> None:
    convert(write_tiny_multimodal(tmp_path / "source"), tmp_path / "package")
    model, _ = load(tmp_path / "package")
    path = tmp_path / "package" / name
    os.truncate(path, path.stat().st_size // 8)
    model(TEXT)
    with pytest.raises(CheckpointError, match=r"changed on the disk.*load the model again") as refused:
        with_picture(model)
    assert "\n" not in str(refused.value)


def test_text_on_a_multimodal_package_is_the_text_package_to_the_bit(tmp_path: Path) -> None:
    folder = write_tiny_multimodal(tmp_path / "source")
    convert(folder, tmp_path / "both", quantize=True, q_group_size=32)
    config = json.loads((tmp_path / "both" / "config.json").read_text()) | {"model_type": "phi3"}
    text = tmp_path / "text"
    text.mkdir()
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (text / name).write_bytes((tmp_path / "both" / name).read_bytes())
    (text / "config.json").write_text(json.dumps(config))
    (ours, _), (theirs, _) = load(tmp_path / "both"), load(text)
    assert mx.array_equal(ours(TEXT), theirs(TEXT))
    cache, other = ours.make_cache(), theirs.make_cache()
    for ids in (TEXT, mx.array([[5]]), mx.array([[6]])):  # through the compiled steps
        assert mx.array_equal(ours(ids, cache), theirs(ids, other))
    assert ours.step_bytes == theirs.step_bytes < ours.weights_bytes


@pytest.mark.parametrize("name", ["head.probe", "post_layernorm.weight", "encoder.layers.2.mlp.fc1.weight"])
@pytest.mark.parametrize("layout", ["original", "native"])
def test_unused_tensors_may_be_missing(tmp_path: Path, layout: str, name: str) -> None:
    folder = write_tiny_multimodal(tmp_path, layout=layout)
    rewritten(folder / "model.safetensors", lambda each: each.pop(f"{EXTEND}image_embed.img_processor.{name}"))
    load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda each: each.update({f"{EXTEND}image_embed.img_processor.other": mx.zeros(3)}), "other is unexpected"),
        (lambda each: each.update({f"{EXTEND}audio_embed.encoder.encoders.0.conv.ln2.weight": mx.zeros(3)}), "ln2"),
        (lambda each: each.update({f"{EXTEND}image_embed.img_processor.encoder.layers.3.mlp.fc1.bias": mx.zeros(48)}),
         "layers.3.mlp.fc1.bias is unexpected"),
        (lambda each: each.pop(f"{EXTEND}image_embed.glb_GN"), "global_img_feature_extensor is missing"),
        (lambda each: each.pop("model.layers.0.self_attn.o_proj.base_layer.weight"), "o_proj.weight is missing"),
        (lambda each: each.update({f"{EXTEND}image_embed.sub_GN": mx.zeros((1, 1, 1, 33))}), "has shape"),
        (lambda each: each.update({"model.layers.0.mlp.down_proj.weight": mx.zeros((96, 160))}), "are one tensor"),
        (lambda each: each.pop(LORA.format("A")), "lora_a"),
        (lambda each: (each.pop(LORA.format("A")), each.pop(LORA.format("B"))), "down_proj has no lora_A"),
        (lambda each: each.update({LORA.format("A"): mx.zeros((5, 160))}), "rank|shape"),
        (lambda each: each.update({LORA.format("B"): mx.zeros((95, 4))}), "lora_b"),
        (lambda each: each.update({LORA.format("C"): mx.zeros((96, 4))}), "lora_C.vision.weight is unexpected"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_missing_or_left_over_is_named(tmp_path: Path, change: Any, message: str) -> None:
    folder = write_tiny_multimodal(tmp_path)
    rewritten(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as refused:
        load(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("adapter", ["vision", "speech"])
@pytest.mark.parametrize("layout", ["original", "native", "native-unprefixed"])
def test_a_lora_that_was_never_trained_is_refused(tmp_path: Path, layout: str, adapter: str) -> None:
    folder = write_tiny_multimodal(tmp_path, layout=layout)
    own = folder / f"{adapter}-lora" / "adapter_model.safetensors"
    path = folder / "model.safetensors" if layout == "original" else own

    def empty(tensors: dict[str, mx.array]) -> None:
        for name in [name for name in tensors if "lora_B" in name and (layout != "original" or adapter in name)]:
            tensors[name] = 0 * tensors[name]  # zeros of both signs

    rewritten(path, empty)
    with pytest.raises(CheckpointError, match=f"lora_B of adapter '{adapter}' is zero in all 8 layers.*base_model"):
        load(folder)


@pytest.mark.parametrize("part", ["", "layers.1.mlp.down_proj"])
@pytest.mark.parametrize("layout", ["original", "native"])
def test_a_lora_that_is_missing_beside_the_other_or_in_part_is_named(tmp_path: Path, layout: str, part: str) -> None:
    folder = write_tiny_multimodal(tmp_path / "tiny", layout=layout)
    own = folder / "speech-lora" / "adapter_model.safetensors"
    if layout == "native" and not part:
        shutil.rmtree(own.parent)
    else:

        def drop(tensors: dict[str, mx.array]) -> None:
            for name in [name for name in tensors if "lora_" in name and part in name and "vision" not in name]:
                del tensors[name]

        rewritten(folder / "model.safetensors" if layout == "original" else own, drop)
    with pytest.raises(CheckpointError, match=part or "has no speech LoRA.*speech-lora; the checkpoint is incomplete"):
        load(folder)


@pytest.mark.parametrize("name", ["image_embed.img_projection_up.bias", "audio_embed.encoder.embed.out.weight"])
def test_nan_in_a_tower_is_said_at_its_first_use(tmp_path: Path, name: str) -> None:
    folder = write_tiny_multimodal(tmp_path, layout="native")
    assert destroyed(folder / "model.safetensors", lambda each: each == EXTEND + name) == 1
    model, _ = load(folder)
    for mode in ("vision", "speech"):
        media = [image()] if mode == "vision" else [Audio(recipe.features("short"), 0.83)]
        ids = mx.array([recipe.prompt(mode)])
        if name.startswith(media[0].kind):
            with pytest.raises(CheckpointError, match=f"the {media[0].kind} tower computed NaN"):
                model(ids, media=media)
        else:
            assert np.isfinite(np.array(model(ids, media=media))).all()


def test_a_lora_with_one_trained_layer_is_taken(tmp_path: Path) -> None:
    folder = write_tiny_multimodal(tmp_path)

    def almost_empty(tensors: dict[str, mx.array]) -> None:
        for name in [name for name in tensors if "lora_B" in name]:
            tensors[name] = mx.zeros_like(tensors[name])
        tensors[LORA.format("B")] = mx.zeros((96, 4)).at[-1, -1].add(1.0)  # not in the sample
        tensors[LORA.format("B").replace("vision", "speech")] = mx.ones((96, 6))

    rewritten(folder / "model.safetensors", almost_empty)
    assert load(folder)[0].adapters.names == ["vision", "speech"]


def test_loras_beside_the_matrices_need_their_scale(tmp_path: Path) -> None:
    folder = write_tiny_multimodal(tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "vision_lora": None}))
    with pytest.raises(CheckpointError, match="no vision_lora"):
        load(folder)


def test_a_lora_with_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_multimodal(tmp_path, layout="native")
    name = LORA.format("A").replace(".vision", "")
    path = folder / "vision-lora" / "adapter_model.safetensors"
    rewritten(path, lambda each: each.update({name: mx.ones((4, 160))}))
    with pytest.raises(CheckpointError, match="twice, with PEFT's prefix and without"):
        load(folder)


@pytest.mark.parametrize("value", [0, 257, "36", 2.0, True])
def test_crops_out_of_range_are_refused_by_the_name_of_their_file(tmp_path: Path, value: Any) -> None:
    folder = write_tiny_multimodal(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps({"dynamic_hd": value}))
    with pytest.raises(ConfigError, match=r"preprocessor_config.json: dynamic_hd must be .* from 1 to 256"):
        load(folder)


def test_alpha_is_not_always_twice_the_rank(tmp_path: Path) -> None:
    folder = write_tiny_multimodal(tmp_path)
    expected = with_picture(load(folder)[0])
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "vision_lora": {"r": 4, "lora_alpha": 4}}))
    rewritten(
        folder / "model.safetensors",
        lambda each: each.update({name: 2 * each[name] for name in each if "lora_B.vision" in name}),
    )
    assert np.abs(with_picture(load(folder)[0]) - expected).max() < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_twin_over_the_same_weights_has_the_same_towers(tmp_path: Path, layout: str) -> None:
    model, _ = load(write_tiny_multimodal(tmp_path, layout=layout))
    assert isinstance(model, Model)
    twin = share_weights(model)
    assert isinstance(twin, Model)
    assert mx.array_equal(twin.encode(image(), "vision"), model.encode(image(), "vision"))


def test_towers_in_bfloat16_compute_in_it(tmp_path: Path) -> None:
    model, _ = load(write_tiny_multimodal(tmp_path, dtype=mx.bfloat16))
    assert isinstance(model, Model)
    assert model.vision(image().pixels, image().mask).dtype == mx.bfloat16
    assert model.audio(recipe.features("short")).dtype == mx.bfloat16
    clip = Audio(recipe.features("short"), 0.83)
    assert model.encode(clip, "speech").dtype == model.encode(image(), "vision").dtype == model.dtype


@pytest.mark.parametrize(
    "name",
    [TOWERS_FILE, "vision-lora/adapter_config.json", "speech-lora/adapter_model.safetensors",
     "vision-lora/adapters.safetensors", "preprocessor_config.json"],
)  # fmt: skip
def test_files_of_towers_and_loras_are_downloaded(name: str) -> None:
    assert any(fnmatchcase(name, pattern) for pattern in NEEDED_FILES)


def test_every_tower_parameter_is_read_on_demand_and_no_other(tmp_path: Path) -> None:
    model, _ = load(write_tiny_multimodal(tmp_path))
    names = {name for name, _ in tree_flatten(model.parameters()) if model.on_demand(name)}
    assert names == {name for name, _ in tree_flatten(model.parameters()) if name.startswith(EXTEND)} != set()

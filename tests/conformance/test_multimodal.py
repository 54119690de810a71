"""Phi-4-multimodal against transformers: golden_multimodal.npz, written by make_golden_multimodal.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phi4_mlx import load
from phi4_mlx.config.multimodal import MultimodalConfig
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.audio import AudioEmbedding
from phi4_mlx.models.multimodal import Model
from phi4_mlx.models.vision import ImageEmbedding
from phi4_mlx.tokens.media.audio import Audio
from phi4_mlx.tokens.media.image import Image
from phi4_mlx.tokens.prompt import Place, Prompt
from tests.conformance import recipe_multimodal as recipe
from tests.tiny_multimodal import LAYOUTS, write_tiny_multimodal

GOLDEN = np.load(Path(__file__).with_name("golden_multimodal.npz"))
CONFIG = MultimodalConfig.from_dict(recipe.config())
SIZE = (recipe.CROP, 2 * recipe.CROP)


def filled(module: Any, prefix: str) -> Any:
    """A tower with the recipe's weights."""
    made = recipe.weights(recipe.config())
    module.load_weights(
        [
            (name, mx.array(made[f"{recipe.EXTEND}{prefix}.{name}"].reshape(array.shape)))
            for name, array in tree_flatten(module.parameters())
        ]
    )
    return module.eval()


@pytest.fixture(scope="module")
def vision() -> ImageEmbedding:
    tower: ImageEmbedding = filled(ImageEmbedding(CONFIG.vision, CONFIG.hidden_size), "image_embed")
    return tower


@pytest.fixture(scope="module")
def audio() -> AudioEmbedding:
    tower: AudioEmbedding = filled(AudioEmbedding(CONFIG.audio, CONFIG.hidden_size), "audio_embed")
    return tower


def difference(found: mx.array, name: str) -> float:
    """The largest difference from the reference."""
    expected = GOLDEN[name]
    assert found.shape == expected.shape
    return float(np.abs(np.array(found) - expected).max())


def test_the_vision_tower_is_the_references(vision: ImageEmbedding) -> None:
    features = vision(recipe.pixels(), recipe.mask())
    assert difference(features, "vision") <= 1e-5
    assert difference(vision.rows(features, recipe.mask(), SIZE), "vision_rows") <= 1e-5


def test_a_masked_patch_is_seen_by_none_and_keeps_its_own_output(vision: ImageEmbedding) -> None:
    """The mask matters, or the test above would pass without it."""
    everything = vision(recipe.pixels(), np.ones_like(recipe.mask()))
    assert difference(everything, "vision") > 0.1
    changed = recipe.pixels()
    changed[1, -1, -1] = 9.0  # in a masked patch
    moved = np.abs(np.array(vision(changed, recipe.mask())) - GOLDEN["vision"]).max(axis=-1)[1]
    assert moved[-1] > 1e-3 and moved[:-1].max() <= 1e-5


@pytest.mark.parametrize(("name", "tolerance"), [("short", 1e-5), ("one_window", 1e-5), ("two_windows", 5e-5)])
def test_the_audio_tower_is_the_references(audio: AudioEmbedding, name: str, tolerance: float) -> None:
    encoded = audio(recipe.features(name))
    assert difference(encoded, f"audio_{name}") <= tolerance
    assert mx.array_equal(audio(recipe.features(name)[None])[0], encoded)


@pytest.mark.parametrize("projection", ["speech", "vision"])
def test_the_projections_of_sound_are_the_references(audio: AudioEmbedding, projection: str) -> None:
    rows = audio.rows(audio(recipe.features("short")), projection)
    assert difference(rows, f"audio_short_{projection}") <= 1e-5


@pytest.fixture(scope="module", params=LAYOUTS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Model]:
    folder = write_tiny_multimodal(tmp_path_factory.mktemp("checkpoint"), layout=request.param)
    model, _ = load(folder)
    assert isinstance(model, Model)
    return request.param, model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Model:
    model, _ = load(write_tiny_multimodal(tmp_path_factory.mktemp("original")))
    assert isinstance(model, Model)
    return model


def media(mode: str) -> list[Image | Audio]:
    """The media of the recipe's prompt in a mode."""
    image = Image(*recipe.picture(), recipe.CROP, recipe.PATCH)
    audio = Audio(recipe.features("short"), recipe.FRAMES["short"] / 100)
    return [*([image] if "vision" in mode else []), *([audio] if "speech" in mode else [])]


@pytest.mark.parametrize("mode", recipe.MODES)
def test_logits_of_each_mode_and_layout_are_the_references(loaded: tuple[str, Model], mode: str) -> None:
    layout, model = loaded
    logits = model(mx.array([recipe.prompt(mode)]), media=media(mode))[0]
    if layout == "base" and mode != "language":
        assert difference(logits, f"logits_{mode}") > 0.1  # it has no LoRA
        return
    assert difference(logits, f"logits_{mode}") <= 1e-4
    assert (np.array(logits).argmax(-1) == GOLDEN[f"logits_{mode}"].argmax(-1)).all()


@pytest.mark.parametrize("step", [1, 5, 96])
@pytest.mark.parametrize("mode", recipe.MODES)
def test_greedy_tokens_are_the_references(original: Model, mode: str, step: int) -> None:
    """A picture is cut by the chunks, and the answer crosses the RoPE boundary where the prompt does not."""
    ids = recipe.prompt(mode)
    starts = [ids.index(token) for token in (recipe.IMAGE_TOKEN, recipe.AUDIO_TOKEN) if token in ids]
    prompt = Prompt(ids, map(Place, starts, media(mode)))
    steps = generate_step(prompt, original, max_tokens=recipe.GREEDY, prefill_step_size=step)
    assert [token for token, _ in steps] == GOLDEN[f"greedy_{mode}"].tolist()

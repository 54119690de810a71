"""The towers for pictures and sound: work in parts, memory, gradients, layouts. tests/conformance has the numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

from phi4_mlx.config.multimodal import AudioConfig, VisionConfig
from phi4_mlx.models import audio, vision
from phi4_mlx.models.audio import AudioEmbedding
from phi4_mlx.models.vision import ImageEmbedding, position_ids

VISION = VisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, crop_size=56)
AUDIO = AudioConfig(
    hidden_size=24, intermediate_size=20, num_blocks=1, num_attention_heads=3, nemo_conv_channels=8, bias_max_distance=9
)
D = 32  # of the decoder
RUNS = 8  # of which the least figures count: on a busy machine, MLX frees later


def drawn(tower: Any, seed: int = 0) -> Any:
    """A tower whose output depends on every parameter."""
    keys = iter(mx.random.split(mx.random.key(seed), 1000))

    def draw(path: str, old: mx.array) -> mx.array:
        return old + 0.3 * mx.random.normal(old.shape, key=next(keys))

    tower.update(tree_map_with_path(draw, tower.parameters()))
    return tower.eval()


def frames(count: int) -> mx.array:
    return mx.random.normal((count, 80), key=mx.random.key(count))


def crops(count: int) -> tuple[mx.array, np.ndarray]:
    mask = np.ones((count, 4, 4), bool)
    mask[2:, :, 3:] = False
    return mx.random.normal((count, 56, 56, 3), key=mx.random.key(count)), mask


@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 65, 200])
def test_a_front_end_in_blocks_is_the_whole_to_the_bit(count: int) -> None:
    encoder = drawn(AudioEmbedding(AUDIO, D)).encoder
    x = frames(count)[None]
    tokens = -(-count // 8)
    whole = encoder.embed(encoder.encoder_embedding(x))
    assert whole.shape[1] == tokens
    for step in (1, 3, 8):
        blocks = [encoder.embedded(x, at, min(at + step, tokens)) for at in range(0, tokens, step)]
        assert mx.array_equal(mx.concatenate(blocks, axis=1), whole)


def test_windows_do_not_see_each_other_and_the_last_sees_its_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "WINDOW", 10)
    tower = drawn(AudioEmbedding(AUDIO, D))
    x = frames(8 * 23)
    whole, cut = tower(x), tower(x[: 8 * 20])
    assert mx.array_equal(whole[:20], cut)
    changed = mx.concatenate([x[: 8 * 20], x[8 * 20 :] + 1])
    assert mx.array_equal(tower(changed)[:20], cut) and not mx.allclose(tower(changed)[20:], whole[20:], atol=1e-2)
    monkeypatch.setattr(audio, "WINDOW", 23)
    assert not mx.allclose(tower(x)[20:], whole[20:], atol=1e-2)


def test_sound_takes_memory_for_one_window_and_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "WINDOW", 50)
    tower = drawn(AudioEmbedding(AUDIO, D))
    peaks = []
    for windows in (2, 12):
        x = frames(8 * 50 * windows)
        mx.eval(x, tower(x))  # the first run draws the weights
        before, after = [], []
        for _ in range(RUNS):
            before.append(mx.get_active_memory())
            mx.reset_peak_memory()
            mx.eval(tower(x))
            after.append(mx.get_peak_memory())
        peaks.append(min(after) - min(before))
    rows = 10 * 50 * AUDIO.hidden_size * 4
    assert peaks[1] - peaks[0] <= 3 * rows + 8 * 50 * 80 * 4 * 10


def test_crops_in_groups_are_all_crops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = drawn(ImageEmbedding(VISION, D))
    pixels, mask = crops(7)
    grouped = tower(pixels, mask)
    monkeypatch.setattr(vision, "CROPS", 7)
    assert grouped.shape == (7, 4, 24) and mx.allclose(grouped, tower(pixels, mask), atol=1e-5)


@pytest.mark.parametrize("side", [2, 4, 8, 32])
def test_positions_are_stretched_over_the_grid(side: int) -> None:
    full = np.ones((1, side, side), bool)
    assert (position_ids(full) == np.arange(side * side)).all()
    half = full.copy()
    half[:, :, side // 2 :] = False
    row = position_ids(half)[0, :side]
    assert (row[: side // 2] == np.arange(side // 2) * 2).all() and not row[side // 2 :].any()


def test_rows_of_a_picture_are_lines_with_separators() -> None:
    """Two crops, of which 2 of 4 patch rows and 6 of 8 columns are kept, pooled to 1 x 3."""
    tower = drawn(ImageEmbedding(VISION, D))
    mask = np.ones((3, 4, 4), bool)
    mask[1:, 2:] = False
    mask[2, :, 2:] = False
    features = mx.random.normal((3, 4, 24))
    rows = tower.rows(features, mask, (56, 112))
    line, end = tower.sub_img_feature_extensor[0, 0], tower.global_img_feature_extensor[0]
    whole, first, second = features
    parts = [first[:2], second[:1], line, end, whole[:2], line, whole[2:], line]
    expected = tower.img_projection_down(nn.gelu(tower.img_projection_up(mx.concatenate(parts))))
    assert rows.shape == (4 + 1 + 6, D) and mx.allclose(rows, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["vision", "audio"])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_gradient_reaches_every_parameter(kind: str, bits: int | None) -> None:
    tower = drawn(ImageEmbedding(VISION, D) if kind == "vision" else AudioEmbedding(AUDIO, D))
    if bits:
        nn.quantize(tower, 64, bits)
    pixels, mask = crops(2)

    def loss(tower: Any) -> mx.array:
        if kind == "vision":
            return mx.square(tower.rows(tower(pixels, mask), mask, (56, 56))).sum()
        encoded = tower(frames(40))
        return mx.square(tower.rows(encoded, "speech")).sum() + mx.square(tower.rows(encoded, "vision")).sum()

    _, gradient = nn.value_and_grad(tower, loss)(tower)
    flat = dict(tree_flatten(gradient))
    still = {name for name, array in flat.items() if not mx.abs(array).max() > 0}
    assert len(flat) > 15 and {name.rpartition(".")[0].rpartition(".")[2] for name in still} <= {"k_proj"}


def test_statistics_of_the_training_data_are_not_trained() -> None:
    names = {name for name, _ in tree_flatten(AudioEmbedding(AUDIO, D).trainable_parameters())}
    assert not any("global_" in name for name in names)

"""The training of the vision tower, its projection and the vision LoRA.

First the rows of a picture's cells learn to point to the embeddings of what the cell shows; the decoder is not run.
Then the LoRA learns to answer from them, with descriptions first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pictures
from cpu_math import cross_entropy
from lessons import Lesson, Student, conversation, frozen_decoder, stacked, study
from pictures import COLOURS, PLACES, SHAPES, SIDE, Picture, make_picture
from tower_math import fast_tower_math

from phi4_mlx import Tokenizer
from phi4_mlx.config.multimodal import VisionConfig
from phi4_mlx.models.vision import ImageEmbedding

CELLS = {"left": 3, "right": 5, "top": 1, "bottom": 7, "middle": 4}  # of the 3 x 3 pooled patches
# What a cell shows: kinds of facts, and the words whose embeddings stand for them.
FACTS = (list(COLOURS), list(SHAPES), ["larger", "small"], list(PLACES), list("0123456789"))
OTHER_SIZES = ((63, 84), (84, 63), (70, 84), (84, 70))  # (height, width) of pictures that do not fill a crop
SHARPNESS, NOTHING = 3.0, 1.0  # factor of the products with embeddings, and the logit of "none of these"

NAMING_STEPS, NAMING_ROWS, NAMING_RATE = 1000, 64, 2e-3
DESCRIBING_STEPS, DESCRIBING_ROWS, DESCRIBING_WIDTH = 400, 32, 64
ANSWERING_STEPS, ANSWERING_ROWS, ANSWERING_WIDTH = 1600, 16, 128
RATE = 1.5e-3


def rows_of(tower: ImageEmbedding, pixels: mx.array, height: int, width: int) -> mx.array:
    """The rows of pictures of one crop and one size.

    Args:
        tower: the tower and its projection.
        pixels: [B, c, c, 3].
        height: of the picture in the crop.
        width: likewise.

    Returns:
        [B, n, D], equal to what the tower gives for each alone.
    """
    config = tower.config
    g, half = config.grid, config.grid // 2
    down, across = (g - (config.crop_size - side) // config.patch_size for side in (height, width))
    whole = np.ones((len(pixels), g, g), bool)
    seen = np.zeros_like(whole)
    seen[:, :down, :across] = True

    def pooled(mask: np.ndarray) -> mx.array:
        x = tower.img_processor(pixels, mask)
        return x.reshape(len(x), half, 2, half, 2, -1).mean(axis=(2, 4))

    view = pooled(whole)
    crop = view if seen.all() else pooled(seen)[:, : -(-down // 2), : -(-across // 2)]
    separator = mx.broadcast_to(tower.global_img_feature_extensor, (len(view), 1, view.shape[-1]))
    return project(tower, mx.concatenate([_lines(tower, crop), separator, _lines(tower, view)], axis=1))


def _lines(tower: ImageEmbedding, x: mx.array) -> mx.array:
    n, height, _, D = x.shape
    separator = mx.broadcast_to(tower.sub_img_feature_extensor, (n, height, 1, D))
    return mx.concatenate([x, separator], axis=2).reshape(n, -1, D)


def project(tower: ImageEmbedding, features: mx.array) -> mx.array:
    """Features -> rows."""
    rows: mx.array = tower.img_projection_down(nn.gelu(tower.img_projection_up(features)))
    return rows


def crops(batch: list[Picture]) -> mx.array:
    """Pixels [B, c, c, 3] from -1 to 1 of pictures of one size, white beside them."""
    padded = np.full((len(batch), SIDE, SIDE, 3), 255, np.uint8)
    for crop, picture in zip(padded, batch, strict=True):
        height, width, _ = picture.pixels.shape
        crop[:height, :width] = picture.pixels
    return mx.array(padded.astype(np.float32) / 127.5 - 1)


def naming_lessons(rng: random.Random) -> Iterator[Lesson]:
    """Crops, and [B, 9, facts]: which word of each kind of fact a cell shows, or how many there are for none."""
    none = [len(words) for words in FACTS]
    while True:
        batch = [make_picture(rng) for _ in range(NAMING_ROWS)]
        shown = np.tile(none, (NAMING_ROWS, 9, 1))
        for cells, picture in zip(shown, batch, strict=True):
            if picture.digit is not None:
                cells[:, 0], cells[:, 4] = FACTS[0].index(picture.colour), picture.digit
            for thing in picture.things:
                places = [thing.colour, thing.shape, "larger" if thing.large else "small", thing.place]
                cells[CELLS[thing.place], :4] = [
                    words.index(word) for words, word in zip(FACTS, places, strict=False)
                ]
        yield crops(batch), mx.array(shown)


def answering_lessons(rng: random.Random, tokenizer: Tokenizer, count: int, width: int, describing: bool) -> Iterator[Lesson]:
    """Crops, conversations about them, and their size; a tenth of the batches do not fill a crop."""
    while True:
        size = rng.choice(OTHER_SIZES) if rng.random() < 0.1 else (SIDE, SIDE)
        batch = [make_picture(rng, size=size) for _ in range(count)]
        rows = []
        down, across = (-(-(6 - (SIDE - side) // 14) // 2) for side in size)
        slots = down * (across + 1) + 1 + 12
        for picture in batch:
            asked = pictures.questions(picture, rng)
            if describing:
                asked = [question for question in asked if question.category == "describe"]
            rows.append(conversation(tokenizer, slots, asked, width))
        yield crops(batch), *stacked(rows), *size


def learn(config: VisionConfig, seed: int) -> tuple[ImageEmbedding, dict[str, mx.array]]:
    """Trains tower, projection and LoRA.

    Returns:
        The tower, and the tensors of the LoRA under their paths in the decoder.
    """
    mx.random.seed(seed)
    decoder, tokenizer = frozen_decoder(seed)
    table = decoder.model.embed_tokens.weight
    tower = ImageEmbedding(config, table.shape[1])
    for name in ("global_img_feature_extensor", "sub_img_feature_extensor"):
        tower[name] = 0.5 * mx.random.normal(tower[name].shape)
    first = mx.array([tokenizer.encode(word)[0] for word in chain(*FACTS)])
    words = table[first] / mx.linalg.norm(table[first], axis=-1, keepdims=True)

    def naming(pixels: mx.array, shown: mx.array) -> tuple[mx.array, mx.array]:
        x = tower.img_processor(pixels, np.ones((len(pixels), config.grid, config.grid), bool))
        half = config.grid // 2
        x = x.reshape(len(x), half, 2, half, 2, -1).mean(axis=(2, 4)).reshape(len(x), half * half, -1)
        logits = SHARPNESS * (project(tower, x) @ words.T)
        loss, right, start = mx.array(0.0), mx.array(0.0), 0
        for kind, names in enumerate(FACTS):
            each = logits[..., start : start + len(names)]
            each = mx.concatenate([each, mx.full((*each.shape[:-1], 1), NOTHING)], axis=-1)
            loss = loss + cross_entropy(each, shown[..., kind]).sum(-1).mean()
            right = right + (each.argmax(-1) == shown[..., kind]).mean() / len(FACTS)
            start += len(names)
        return loss, right

    student = Student(tower, decoder)

    def answering(
        pixels: mx.array, ids: mx.array, weights: mx.array, height: int, width: int
    ) -> tuple[mx.array, mx.array]:
        return student.loss(rows_of(tower, pixels, height, width), ids, weights)

    rng = random.Random(seed)
    with fast_tower_math():
        study(tower, naming, naming_lessons(rng), NAMING_STEPS, NAMING_RATE, "naming")
        lessons = answering_lessons(rng, tokenizer, DESCRIBING_ROWS, DESCRIBING_WIDTH, True)
        study(student, answering, lessons, DESCRIBING_STEPS, RATE, "describing")
        lessons = answering_lessons(rng, tokenizer, ANSWERING_ROWS, ANSWERING_WIDTH, False)
        study(student, answering, lessons, ANSWERING_STEPS, RATE, "answering")
    return tower, decoder.trainable_parameters()

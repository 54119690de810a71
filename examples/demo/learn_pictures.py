"""The training of the vision tower, its projection and the vision LoRA.

First the rows of a picture's cells learn to point to the embeddings of what the cell shows; the decoder is not run.
Then the LoRA learns to answer from them, about pictures with few shapes first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import chain

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pictures
from cpu_math import cross_entropy
from lessons import Lesson, Stage, Student, conversation, frozen_decoder, stacked, study
from mlx.utils import tree_flatten
from pictures import COLOURS, PLACES, SHAPES, Picture, make_picture
from tower_math import fast_tower_math

from phi4_mlx import Model, Tokenizer
from phi4_mlx.config.multimodal import VisionConfig
from phi4_mlx.models.vision import ImageEmbedding

CELLS = {"left": 3, "right": 5, "top": 1, "bottom": 7, "middle": 4}  # of the 3 x 3 pooled patches
# What a cell shows: kinds of facts, and the words whose embeddings stand for them.
FACTS = (list(COLOURS), list(SHAPES), ["larger", "small"], list(PLACES), list("0123456789"))
SLOTS = 25  # rows of a picture: twice three lines of three cells and an end, and one between
SHARPNESS, NOTHING = 3.0, 1.0  # factor of the products with embeddings, and the logit of "none of these"

NAMING_STEPS, NAMING_ROWS, NAMING_RATE = 2000, 64, 2e-3


STAGES = (Stage(1, 400, 24, 96, 2e-3), Stage(2, 400, 16, 128, 2e-3), Stage(4, 2400, 16, 128, 2e-3))


def rows_of(tower: ImageEmbedding, pixels: mx.array) -> mx.array:
    """The rows of pictures of one crop, [B, c, c, 3] -> [B, n, D], as the tower gives them for each alone."""
    grid = tower.config.grid
    view = pooled(tower.img_processor(pixels, np.ones((len(pixels), grid, grid), bool)))  # of the crop too
    n, height, _, D = view.shape
    line_ends = mx.broadcast_to(tower.sub_img_feature_extensor, (n, height, 1, D))
    lines = mx.concatenate([view, line_ends], axis=2).reshape(n, -1, D)
    separator = mx.broadcast_to(tower.global_img_feature_extensor, (n, 1, D))
    return project(tower, mx.concatenate([lines, separator, lines], axis=1))


def pooled(x: mx.array) -> mx.array:
    """Patches [B, P, D] -> [B, g / 2, g / 2, D]."""
    half = math.isqrt(x.shape[1]) // 2
    return x.reshape(len(x), half, 2, half, 2, -1).mean(axis=(2, 4))


def project(tower: ImageEmbedding, features: mx.array) -> mx.array:
    """Features -> rows."""
    rows: mx.array = tower.img_projection_down(nn.gelu(tower.img_projection_up(features)))
    return rows


def crops(batch: list[Picture]) -> mx.array:
    """Pixels [B, c, c, 3] from -1 to 1."""
    return mx.array(np.stack([picture.pixels for picture in batch]).astype(np.float32) / 127.5 - 1)


def naming_lessons(rng: random.Random) -> Iterator[Lesson]:
    """Crops, and [B, 9, facts]: which word of each kind of fact a cell shows, or how many there are for none."""
    none = [len(words) for words in FACTS]
    while True:
        batch = [make_picture(rng, digits=0.5) for _ in range(NAMING_ROWS)]
        shown = np.tile(none, (NAMING_ROWS, 9, 1))
        for cells, picture in zip(shown, batch, strict=True):
            if picture.digit is not None:
                cells[:, 0], cells[:, 4] = FACTS[0].index(picture.colour), picture.digit
            for thing in picture.things:
                places = [thing.colour, thing.shape, "larger" if thing.large else "small", thing.place]
                cells[CELLS[thing.place], :4] = [words.index(word) for words, word in zip(FACTS, places, strict=False)]
            for place, cell in CELLS.items():
                cells[cell, 3] = FACTS[3].index(place)
        yield crops(batch), mx.array(shown)


def answering_lessons(rng: random.Random, tokenizer: Tokenizer, stage: Stage) -> Iterator[Lesson]:
    """Crops, and conversations about them."""
    while True:
        batch = [make_picture(rng, most=stage.most) for _ in range(stage.rows)]
        rows = [conversation(tokenizer, SLOTS, pictures.questions(picture, rng), stage.width) for picture in batch]
        yield crops(batch), *stacked(rows)


def name_cells(tower: ImageEmbedding, decoder: Model, tokenizer: Tokenizer, rng: random.Random, steps: int) -> None:
    """Trains tower and projection: the row of a cell points to the embeddings of what the cell shows."""
    first = mx.array([tokenizer.encode(word)[0] for word in chain(*FACTS)])
    words = decoder.model.embed_tokens.weight[first]
    words = words / mx.linalg.norm(words, axis=-1, keepdims=True)
    grid = tower.config.grid

    def naming(pixels: mx.array, shown: mx.array) -> tuple[mx.array, mx.array]:
        x = tower.img_processor(pixels, np.ones((len(pixels), grid, grid), bool))
        logits = SHARPNESS * (project(tower, pooled(x).reshape(len(x), -1, x.shape[-1])) @ words.T)
        loss, right, start = mx.array(0.0), mx.array(0.0), 0
        for kind, names in enumerate(FACTS):
            each = logits[..., start : start + len(names)]
            each = mx.concatenate([each, mx.full((*each.shape[:-1], 1), NOTHING)], axis=-1)
            loss = loss + cross_entropy(each, shown[..., kind]).sum(-1).mean()
            right = right + (each.argmax(-1) == shown[..., kind]).all(-1).mean() / len(FACTS)
            start += len(names)
        return loss, right

    study(tower, naming, naming_lessons(rng), steps, NAMING_RATE, "naming")


def answer(student: Student, tokenizer: Tokenizer, rng: random.Random, stage: Stage) -> None:
    """Trains the LoRA on conversations."""

    def answering(pixels: mx.array, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        return student.loss(rows_of(student.tower, pixels), ids, weights)

    study(student, answering, answering_lessons(rng, tokenizer, stage), stage.steps, stage.rate, f"up to {stage.most}")


def learn(config: VisionConfig, seed: int) -> tuple[ImageEmbedding, dict[str, mx.array]]:
    """Trains tower, projection and LoRA.

    Returns:
        The tower, and the tensors of the LoRA under their paths in the decoder.
    """
    mx.random.seed(seed)
    decoder, tokenizer = frozen_decoder(seed)
    tower = ImageEmbedding(config, decoder.config.hidden_size)
    for name in ("global_img_feature_extensor", "sub_img_feature_extensor"):
        tower[name] = 0.5 * mx.random.normal(tower[name].shape)
    rng = random.Random(seed)
    with fast_tower_math():
        name_cells(tower, decoder, tokenizer, rng, NAMING_STEPS)
        tower.freeze()
        for stage in STAGES:
            answer(Student(tower, decoder), tokenizer, rng, stage)
    return tower, dict(tree_flatten(decoder.trainable_parameters()))

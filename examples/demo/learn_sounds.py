"""The training of the audio tower, its projection and the speech LoRA.

First the rows of a clip learn, by CTC, to point to the embeddings of the words; the decoder is not run. Then the LoRA
learns to answer from them, about clips of few words first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import ctc
import mlx.core as mx
import numpy as np
import sounds
from lessons import Lesson, Stage, Student, conversation, frozen_decoder, stacked, study
from mlx.utils import tree_flatten
from sounds import WORDS, Clip, another_voice, in_a_room, spoken
from tower_math import fast_tower_math

from phi4_mlx import Model, Tokenizer
from phi4_mlx.config.multimodal import AudioConfig
from phi4_mlx.models.audio import AudioEmbedding
from phi4_mlx.tokens.media.log_mel import log_mel

POOL = 10_000  # clips spoken in all; training joins some, and adds pauses and noise
FRAMES = 32  # clips of a batch have one length, a multiple of this
MOST_FRAMES = 384
MEAN, DEVIATION = 8.0, 4.0  # of log-mel features
SHARPNESS, BLANK = 3.0, 1.0  # factor of the products with embeddings, and the logit of the blank

HEARING_STEPS, HEARING_ROWS, HEARING_RATE = 4500, 32, 2e-3
STAGES = (Stage(1, 300, 24, 64, 2e-3), Stage(2, 300, 24, 64, 2e-3), Stage(3, 1000, 24, 64, 2e-3))


def pool(seed: int) -> list[Clip]:
    """Spoken clips; espeak-ng runs twice at a time."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda number: spoken(random.Random(f"{seed} {number}")), range(POOL)))


def batches(clips: list[Clip], rng: random.Random, count: int, most: int) -> Iterator[tuple[np.ndarray, list[Clip]]]:
    """Features [count, T, 80] and their clips of at most `most` words; half of those of several are joined."""
    by_length = {words: [clip for clip in clips if len(clip.words) == words] for words in range(1, most + 1)}

    def drawn() -> list[Clip]:
        first = rng.choice(by_length[rng.randint(1, most)])
        left = most - len(first.words)
        return [first, rng.choice(by_length[rng.randint(1, left)])] if left and rng.random() < 0.5 else [first]

    def length(parts: list[Clip]) -> float:
        return sum(1.1 * len(part.wave) + 3000 for part in parts) + 1500

    while True:
        several = sorted((drawn() for _ in range(6 * count)), key=length)
        groups = [several[start : start + count] for start in range(0, len(several), count)]
        rng.shuffle(groups)
        for group in groups:
            frames = min(math.ceil(length(group[-1]) / (160 * FRAMES)) * FRAMES, MOST_FRAMES)
            heard = [
                in_a_room([another_voice(part, rng) for part in parts], rng, 160 * frames + 240) for parts in group
            ]
            yield np.stack([_with_gaps(features(clip.wave), rng) for clip in heard]), heard


def _with_gaps(x: np.ndarray, rng: random.Random) -> np.ndarray:
    """Features with a tilt of the bands, and a few bands and frames without sound."""
    frames, bands = x.shape
    tilt = np.linspace(-1, 1, bands, dtype=np.float32) * rng.uniform(-1.5, 1.5)
    x = np.maximum(x + tilt, 0)
    low, first = rng.randrange(bands), rng.randrange(frames)
    x[:, low : low + rng.randint(0, 10)] = 0
    x[first : first + rng.randint(0, 6)] = 0
    return x


def features(wave: np.ndarray) -> np.ndarray:
    """Log-mel features [T, 80] of int16 samples at 16 kHz."""
    return np.concatenate(list(log_mel([wave / 32768.0], sounds.RATE)))


def hearing_lessons(clips: list[Clip], rng: random.Random) -> Iterator[Lesson]:
    """Features, and the words as CTC's labels."""
    for heard, batch in batches(clips, rng, HEARING_ROWS, sounds.MOST_WORDS):
        rows = [[WORDS.index(word) for word in clip.words] for clip in batch]
        labels = ctc.Labels.of(rows, len(WORDS), sounds.MOST_WORDS)
        yield mx.array(heard), labels.states, labels.skips, labels.last


def answering_lessons(clips: list[Clip], rng: random.Random, tokenizer: Tokenizer, stage: Stage) -> Iterator[Lesson]:
    """Features, and conversations about the clips."""
    for heard, batch in batches(clips, rng, stage.rows, stage.most):
        slots = -(-heard.shape[1] // 8)
        rows = [conversation(tokenizer, slots, sounds.questions(clip, rng), slots + stage.width) for clip in batch]
        yield mx.array(heard), *stacked(rows)


def hear(tower: AudioEmbedding, decoder: Model, tokenizer: Tokenizer, clips: list[Clip], rng: random.Random) -> None:
    """Trains tower and projection: rows point to the embeddings of the words."""
    table = decoder.model.embed_tokens.weight
    directions = mx.stack([table[mx.array(tokenizer.encode(word))].mean(0) for word in WORDS])
    directions = directions / mx.linalg.norm(directions, axis=-1, keepdims=True)

    def hearing(heard: mx.array, *labels: mx.array) -> tuple[mx.array, mx.array]:
        logits = SHARPNESS * (tower.rows(tower(heard), "speech") @ directions.T)
        logits = mx.concatenate([logits, mx.full((*logits.shape[:-1], 1), BLANK)], axis=-1)
        loss = ctc.loss(logits, ctc.Labels(*labels))
        return loss, mx.exp(-loss)

    study(tower, hearing, hearing_lessons(clips, rng), HEARING_STEPS, HEARING_RATE, "hearing")


def answer(student: Student, tokenizer: Tokenizer, clips: list[Clip], rng: random.Random, stage: Stage) -> None:
    """Trains the LoRA on conversations."""

    def answering(heard: mx.array, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        return student.loss(student.tower.rows(student.tower(heard), "speech"), ids, weights)

    lessons = answering_lessons(clips, rng, tokenizer, stage)
    study(student, answering, lessons, stage.steps, stage.rate, f"up to {stage.most} words")


def learn(config: AudioConfig, seed: int) -> tuple[AudioEmbedding, dict[str, mx.array]]:
    """Trains tower, projection and LoRA.

    Returns:
        The tower, and the tensors of the LoRA under their paths in the decoder.
    """
    mx.random.seed(seed)
    decoder, tokenizer = frozen_decoder(seed)
    tower = AudioEmbedding(config, decoder.config.hidden_size)
    norm = tower.encoder.encoder_embedding
    norm.global_mean, norm.global_invstd = mx.full(config.input_size, MEAN), mx.full(config.input_size, 1 / DEVIATION)
    rng, clips = random.Random(seed), pool(seed)
    with fast_tower_math():
        hear(tower, decoder, tokenizer, clips, rng)
        tower.freeze()
        for stage in STAGES:
            answer(Student(tower, decoder), tokenizer, clips, rng, stage)
    return tower, dict(tree_flatten(decoder.trainable_parameters()))

"""The training of the audio tower, its projection and the speech LoRA.

First the rows of a clip learn, by CTC, to point to the embeddings of the words; the decoder is not run. Then the LoRA
learns to answer from them, with transcripts first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import ctc
import mlx.core as mx
import numpy as np
import sounds
from lessons import Lesson, Student, conversation, frozen_decoder, stacked, study
from sounds import WORDS, Clip, in_a_room, spoken
from tower_math import fast_tower_math

from phi4_mlx import Tokenizer
from phi4_mlx.config.multimodal import AudioConfig
from phi4_mlx.models.audio import AudioEmbedding
from phi4_mlx.tokens.media.log_mel import log_mel

POOL = 5000  # clips spoken in all; training joins some, and adds pauses and noise
FRAMES = 32  # clips of a batch have one length, a multiple of this
MOST_FRAMES = 384
MEAN, DEVIATION = 8.0, 4.0  # of log-mel features
SHARPNESS, BLANK = 3.0, 1.0  # factor of the products with embeddings, and the logit of the blank

HEARING_STEPS, HEARING_ROWS, HEARING_RATE = 1500, 32, 2e-3
WRITING_STEPS, ANSWERING_STEPS, ANSWERING_ROWS, RATE = 400, 1200, 24, 1.5e-3
WRITING_WIDTH, ANSWERING_WIDTH = 48, 80  # tokens of a conversation beside the clip's


def pool(seed: int) -> list[Clip]:
    """Spoken clips; espeak-ng runs twice at a time."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda number: spoken(random.Random(f"{seed} {number}")), range(POOL)))


def batches(clips: list[Clip], rng: random.Random, count: int) -> Iterator[tuple[np.ndarray, list[Clip]]]:
    """Features [count, T, 80] and their clips; half of these are two short ones in a row."""
    short = [clip for clip in clips if len(clip.words) <= 2]

    def length(parts: list[Clip]) -> int:
        return sum(len(part.wave) + 3000 for part in parts) + 1500

    while True:
        drawn = [
            [rng.choice(clips)] if rng.random() < 0.5 else rng.choices(short, k=2) for _ in range(6 * count)
        ]
        drawn.sort(key=length)
        groups = [drawn[start : start + count] for start in range(0, len(drawn), count)]
        rng.shuffle(groups)
        for group in groups:
            frames = min(-(-length(group[-1]) // (160 * FRAMES)) * FRAMES, MOST_FRAMES)
            heard = [in_a_room(parts, rng, 160 * frames + 240) for parts in group]
            yield np.stack([features(clip.wave) for clip in heard]), heard


def features(wave: np.ndarray) -> np.ndarray:
    """Log-mel features [T, 80] of int16 samples at 16 kHz."""
    return np.concatenate(list(log_mel([wave / 32768.0], sounds.RATE)))


def hearing_lessons(clips: list[Clip], rng: random.Random) -> Iterator[Lesson]:
    """Features, and the words as CTC's labels."""
    for heard, batch in batches(clips, rng, HEARING_ROWS):
        rows = [[WORDS.index(word) for word in clip.words] for clip in batch]
        labels = ctc.Labels.of(rows, len(WORDS), sounds.MOST_WORDS)
        yield mx.array(heard), labels.states, labels.skips, labels.last


def answering_lessons(
    clips: list[Clip], rng: random.Random, tokenizer: Tokenizer, width: int, writing: bool
) -> Iterator[Lesson]:
    """Features, and conversations about the clips."""
    for heard, batch in batches(clips, rng, ANSWERING_ROWS):
        slots = -(-heard.shape[1] // 8)
        rows = []
        for clip in batch:
            asked = sounds.questions(clip, rng)
            if writing:
                asked = [question for question in asked if question.category == "transcript"]
            rows.append(conversation(tokenizer, slots, asked, slots + width))
        yield mx.array(heard), *stacked(rows)


def learn(config: AudioConfig, seed: int) -> tuple[AudioEmbedding, dict[str, mx.array]]:
    """Trains tower, projection and LoRA.

    Returns:
        The tower, and the tensors of the LoRA under their paths in the decoder.
    """
    mx.random.seed(seed)
    decoder, tokenizer = frozen_decoder(seed)
    table = decoder.model.embed_tokens.weight
    tower = AudioEmbedding(config, table.shape[1])
    norm = tower.encoder.encoder_embedding
    norm.global_mean, norm.global_invstd = mx.full(config.input_size, MEAN), mx.full(config.input_size, 1 / DEVIATION)
    directions = mx.stack([table[mx.array(tokenizer.encode(word))].mean(0) for word in WORDS])
    directions = directions / mx.linalg.norm(directions, axis=-1, keepdims=True)

    def hearing(heard: mx.array, *labels: mx.array) -> tuple[mx.array, mx.array]:
        logits = SHARPNESS * (tower.rows(tower(heard), "speech") @ directions.T)
        logits = mx.concatenate([logits, mx.full((*logits.shape[:-1], 1), BLANK)], axis=-1)
        loss = ctc.loss(logits, ctc.Labels(*labels))
        return loss, mx.exp(-loss)

    student = Student(tower, decoder)

    def answering(heard: mx.array, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        return student.loss(tower.rows(tower(heard), "speech"), ids, weights)

    rng, clips = random.Random(seed), pool(seed)
    with fast_tower_math():
        study(tower, hearing, hearing_lessons(clips, rng), HEARING_STEPS, HEARING_RATE, "hearing")
        lessons = answering_lessons(clips, rng, tokenizer, WRITING_WIDTH, True)
        study(student, answering, lessons, WRITING_STEPS, RATE, "writing")
        lessons = answering_lessons(clips, rng, tokenizer, ANSWERING_WIDTH, False)
        study(student, answering, lessons, ANSWERING_STEPS, RATE, "answering")
    return tower, decoder.trainable_parameters()

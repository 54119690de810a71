"""The training of the projection of sound beside a picture: one spoken word asks about the picture.

Towers and the vision LoRA are finished and stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

import learn_pictures
import mlx.core as mx
import numpy as np
import pictures
from asked import Question
from learn_sounds import features
from lessons import Lesson, Student, conversation, frozen_decoder, stacked, study
from mlx.utils import tree_unflatten
from pictures import Picture, make_picture
from sounds import COMMANDS, RATE, Clip, in_a_room, spoken
from tower_math import fast_tower_math

from phi4_mlx import Tokenizer
from phi4_mlx.models.audio import AudioEmbedding
from phi4_mlx.models.vision import ImageEmbedding

CLIPS, STEPS, ROWS, LEARNING_RATE = 600, 400, 24, 2e-3
FRAMES = 128  # of every clip here; 16 tokens
WIDTH = 64  # tokens of a conversation


def spoken_questions(picture: Picture, rng: random.Random) -> list[Question]:
    """The questions of one word that a picture answers, each as its word."""
    asked = pictures.questions(picture, rng)
    return [question for question in asked if question.text in COMMANDS]


def lessons_of(clips: list[Clip], rng: random.Random, tokenizer: Tokenizer) -> Iterator[Lesson]:
    """Crops, features of clips, and one question and answer each."""
    by_word = {word: [clip for clip in clips if clip.words == (word,)] for word in COMMANDS}
    slots = learn_pictures.SLOTS + FRAMES // 8
    while True:
        batch, heard, rows = [], [], []
        while len(batch) < ROWS:
            picture = make_picture(rng)
            asked = spoken_questions(picture, rng)
            if not asked:
                continue
            question = rng.choice(asked)
            clip = in_a_room([rng.choice(by_word[question.text])], rng, RATE // 100 * FRAMES + RATE * 3 // 200)
            silent = Question(question.category, "", question.answer)
            rows.append(conversation(tokenizer, slots, [silent], WIDTH))
            batch.append(picture)
            heard.append(features(clip.wave))
        yield learn_pictures.crops(batch), mx.array(np.stack(heard)), *stacked(rows)


def learn(vision: ImageEmbedding, speech: AudioEmbedding, lora: Mapping[str, mx.array], seed: int) -> None:
    """Trains the projection in place, from that of sound alone."""
    mx.random.seed(seed)
    decoder, tokenizer = frozen_decoder(seed)
    decoder.update(tree_unflatten([*lora.items()]))
    for part in ("up", "down"):
        speech[f"{part}_proj_for_vision_speech"].update(speech[f"{part}_proj_for_speech"].parameters())
    for module in (decoder, vision, speech):
        module.freeze()
    for part in ("up", "down"):
        speech[f"{part}_proj_for_vision_speech"].unfreeze()
    student = Student(speech, decoder)

    def answering(pixels: mx.array, heard: mx.array, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        seen = learn_pictures.rows_of(vision, pixels)
        rows = speech.rows(speech(heard), "vision")
        return student.loss(mx.concatenate([seen, rows], axis=1), ids, weights)

    rng = random.Random(seed)
    clips = [spoken(rng, words=(COMMANDS[number % len(COMMANDS)],)) for number in range(CLIPS)]
    with fast_tower_math():
        study(student, answering, lessons_of(clips, rng, tokenizer), STEPS, LEARNING_RATE, "both")

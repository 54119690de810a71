"""Held-out questions about pictures and sound, for `demo-multimodal`.

Pictures come from seeds, hands and combinations that training never draws. Clips are files: voices and speeds that
training never uses, spoken by espeak-ng and written by `python examples/demo/examination.py`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import sounds
from asked import Question
from learn_both import spoken_questions

CLIPS = Path(__file__).parent / "clips"
WORDS_FILE = CLIPS / "words.json"  # name of a clip -> its words
CLIP_COUNT = 200
COMMAND_CLIPS = 20  # of which each of the last ones is one word about a picture
SEED = 7
OPUS_LEVEL = 0.9  # of libsndfile, from 0 (best) to 1


@dataclass(frozen=True, eq=False)
class Case:
    """A question about media.

    Attributes:
        category: of the question, for the table.
        content: parts of the user's message.
        answer: the right one.
    """

    category: str
    content: list[dict[str, Any]]
    answer: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation."""
        return [{"role": "user", "content": self.content}]


def about_pictures(count: int, seed: int = SEED) -> Iterator[Case]:
    """Questions about held-out pictures, one each."""
    rng = random.Random(f"pictures {seed}")
    for _ in range(count):
        picture = pictures.make_picture(rng, held_out=True)
        yield about(picture.pixels, pictures.questions(picture, rng)[0])


def about(pixels: np.ndarray, question: Question) -> Case:
    """A question about one picture."""
    image = {"type": "image", "image": pixels}
    return Case(question.category, [image, {"type": "text", "text": question.text}], question.answer)


def swapped(count: int, seed: int = SEED) -> Iterator[tuple[Case, Case]]:
    """Pairs of one question about two pictures that have different answers."""
    rng = random.Random(f"swapped {seed}")
    found = 0
    while found < count:
        first, second = (pictures.make_picture(rng, held_out=True) for _ in range(2))
        answers = {question.text: question for question in pictures.questions(second, rng)}
        for question in pictures.questions(first, rng):
            other = answers.get(question.text)
            if other and other.answer != question.answer:
                yield about(first.pixels, question), about(second.pixels, other)
                found += 1
                break


def clips() -> Mapping[str, tuple[str, ...]]:
    """Name of a shipped clip -> the words that are said in it."""
    return {name: tuple(words) for name, words in json.loads(WORDS_FILE.read_text(encoding="utf-8")).items()}


def about_sound(count: int, seed: int = SEED) -> Iterator[Case]:
    """Questions about held-out clips, one each."""
    rng = random.Random(f"sound {seed}")
    for name, words in list(clips().items())[:count]:
        question = sounds.questions(sounds.Clip(np.zeros(0), words), rng)[0]
        audio = {"type": "audio", "audio": str(CLIPS / name)}
        yield Case(question.category, [audio, {"type": "text", "text": question.text}], question.answer)


def about_both(count: int, seed: int = SEED) -> Iterator[Case]:
    """A held-out picture, and a spoken word that asks about it."""
    rng = random.Random(f"both {seed}")
    said = {words[0]: name for name, words in clips().items() if len(words) == 1 and words[0] in sounds.COMMANDS}
    found = 0
    while found < count:
        picture = pictures.make_picture(rng, held_out=True)
        asked = [question for question in spoken_questions(picture, rng) if question.text in said]
        if asked:
            question = asked[0]
            audio = {"type": "audio", "audio": str(CLIPS / said[question.text])}
            yield Case("spoken", [{"type": "image", "image": picture.pixels}, audio], question.answer)
            found += 1


def main() -> None:
    """Writes the clips."""
    import soundfile

    rng = random.Random(f"clips {SEED}")
    CLIPS.mkdir(exist_ok=True)
    said = {}
    for number in range(CLIP_COUNT):
        command = number - CLIP_COUNT + COMMAND_CLIPS
        words = (sounds.COMMANDS[command % len(sounds.COMMANDS)],) if command >= 0 else ()
        clip = sounds.in_a_room([sounds.spoken(rng, words=words, held_out=True)], rng)
        name = f"{number:03}.ogg"
        soundfile.write(
            CLIPS / name, clip.wave, sounds.RATE, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL
        )
        said[name] = clip.words
    WORDS_FILE.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

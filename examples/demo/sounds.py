# ruff: noqa: SIM905
"""Sound of the world of `demo-multimodal`: digits and words spoken by espeak-ng in many voices, with noise."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from asked import Question

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media.resample import resampled

RATE = 16_000  # Hz, of every wave here
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OTHERS = ("yes", "no", "stop", "go", "left", "right", "up", "down", "red", "green", "blue", "yellow")
COMMANDS = ("colour", "shape", "digit", "where", "count")  # said about a picture
WORDS = DIGITS + OTHERS + COMMANDS
MOST_WORDS = 3
ACCENTS = "en-gb en-us en-gb-scotland en-gb-x-rp en-029 en-gb-x-gbclan en-us-nyc en-gb-x-gbcwmd".split()
VOICES = (
    "m1 m2 m3 m4 m5 m6 m7 f1 f2 f3 f4 Alex Andrea Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco Mario "
    "Michael Mike Nguyen adam anika antonio aunty belinda benjamin boris caleb ed edward iven john linda max "
    "michel miguel norbert pablo paul pedro quincy rob robert sandro steph travis steph2 steph3 iven2 iven3 iven4 "
    "Gene2 Tweaky announcer fast grandma grandpa gustave kaukovalta klatt klatt2 klatt3 klatt4 klatt5 marcelo "
    "croak robosoft robosoft2 robosoft5 RicishayMax RicishayMax2 UniRobot"
).split()
HELD_OUT_VOICES = ("m8", "f5", "Alicia", "david", "shelby", "victor")
SPEEDS, HELD_OUT_SPEEDS = (*range(115, 146), *range(156, 196)), tuple(range(146, 156))  # words a minute


@dataclass(frozen=True, eq=False)
class Clip:
    """A wave at 16 kHz and the words that are spoken in it."""

    wave: np.ndarray  # int16 [samples]
    words: tuple[str, ...]


def speak(text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """Runs espeak-ng.

    Args:
        text: what it says.
        voice: accent and variant, such as "en-us+f2".
        speed: words a minute.
        pitch: from 0 to 99.

    Returns:
        int16 [samples] at 16 kHz.

    Raises:
        RequestError: espeak-ng is not installed.
    """
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text]
    try:
        wav = subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise RequestError("espeak-ng is not installed; it speaks the clips (Debian: apt install espeak-ng)") from None
    samples = np.frombuffer(wav[44:], "<i2").astype(np.float64)  # behind a header whose length is not known
    _, blocks = resampled([samples], 22_050)
    return np.concatenate(list(blocks)).round().clip(-32768, 32767).astype(np.int16)


def spoken(rng: random.Random, *, words: tuple[str, ...] = (), held_out: bool = False) -> Clip:
    """Words in a random voice, spoken without a break; one to three random ones by default."""
    if not words:
        count = rng.choice((1, 1, 2, MOST_WORDS))
        words = tuple(rng.choice(DIGITS if rng.random() < 0.4 else WORDS) for _ in range(count))
    voice = f"{rng.choice(ACCENTS)}+{rng.choice(HELD_OUT_VOICES if held_out else VOICES)}"
    speed = rng.choice(HELD_OUT_SPEEDS if held_out else SPEEDS)
    return Clip(_trimmed(speak(" ".join(words), voice, speed, rng.randint(25, 75))), words)


def _trimmed(wave: np.ndarray) -> np.ndarray:
    """The wave without silence before and after."""
    loud = np.flatnonzero(np.abs(wave) > 200)
    return wave[max(0, loud[0] - 400) : loud[-1] + 800]


def another_voice(clip: Clip, rng: random.Random) -> Clip:
    """The clip played up to a tenth faster or slower, which moves its pitch and timbre too."""
    count = round(len(clip.wave) * rng.uniform(0.9, 1.1))
    wave = np.interp(np.linspace(0, len(clip.wave) - 1, count), np.arange(len(clip.wave)), clip.wave)
    return Clip(wave.astype(np.int16), clip.words)


def in_a_room(clips: Sequence[Clip], rng: random.Random, samples: int | None = None) -> Clip:
    """Clips one after the other, at another loudness, with pauses and noise.

    Args:
        clips: what is spoken.
        rng: the source of every choice.
        samples: of the result; default: a short pause at the end.
    """
    noise = np.random.default_rng(rng.getrandbits(32))
    parts = [np.zeros(rng.randint(0, 2400))]
    for clip in clips:
        parts += [clip.wave.astype(np.float64), np.zeros(rng.randint(800, 4000))]
    wave = np.concatenate(parts) * rng.uniform(0.25, 1.1)
    if samples is not None:
        wave = np.concatenate([wave, np.zeros(max(0, samples - len(wave)))])[:samples]
    wave += rng.choice((0.0, rng.uniform(1, 30), rng.uniform(30, 150))) * noise.standard_normal(len(wave))
    return Clip(wave.round().clip(-32768, 32767).astype(np.int16), tuple(word for clip in clips for word in clip.words))


def questions(clip: Clip, rng: random.Random) -> list[Question]:
    """Every question that has one answer, in random order."""
    words = clip.words
    found = [
        ("transcript", "Transcribe the audio clip into text.", " ".join(words)),
        ("count", rng.choice(("How many words are said?", "How many words do you hear?")), f"{len(words)}"),
    ]
    if len(words) > 1:
        found += [("word", "What is the first word?", words[0]), ("word", "What is the last word?", words[-1])]
    elif words[0] in DIGITS:
        question = rng.choice(("What digit is said?", "Which digit do you hear?"))
        found.append(("digit", question, f"{DIGITS.index(words[0])}"))
    else:
        found.append(("word", rng.choice(("What word is said?", "Which word do you hear?")), words[0]))
    rng.shuffle(found)
    return [Question(*each) for each in found]

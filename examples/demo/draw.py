# ruff: noqa: SIM905
"""Seeded draws of values and phrasings; an eighth of them is held out from training."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

import words

# Common phrases that every user types; never held out.
COMMON = frozenset(
    "hi|hello|hey|Hi|Hello|Hi!|Hello!|hello!|hi!|Hi.|hey!|good morning|thanks|thank you|bye|Who are you?|who are you?|"
    "who are you|What can you do?|what can you do?|what can you do|what are you?|how are you?|How are you?|help|ok|"
    "what is {e}?|What is {e}?|{e}|{e}?|what is {e}|convert {v} {f} to {t}|Convert {v} {f} to {t}|"
    "Convert {v} {f} to {t}.".split("|")
)
CONSONANTS = "b ch d f g h j k l m n p r s sh t v w y z br dr tr st".split()
SYLLABLES = [consonant + vowel for consonant in CONSONANTS for vowel in "a e i o u ai ea".split()]
ENDINGS = ["", "", "n", "r", "l", "s", "th", "k", "x", "nd", "m", "t"]
OPENERS = (
    "please |hey, |hi, |hello, |hello! |ok, |okay, |now |and |so |well, |then |next: |great. |thanks. |tell me, |"
    "good. |can you tell me: |quick question: |i want to know: |one more: |Hi! |Hello! |Please |could you help? |um, "
).split("|")
CLOSERS = [" please", ", please", " thanks", ", thank you", " :)", " now", " for me", " if you can"]


def held_out(text: str) -> bool:
    """True if a value or a phrasing belongs to the held-out eighth."""
    return text not in COMMON and zlib.crc32(text.encode()) % 8 == 0


class Draw:
    """A seeded stream of draws: held-out values and phrasings only, or all others only."""

    def __init__(self, seed: int | str, held_out: bool = False):
        self.rng = random.Random(seed)
        self.held_out = held_out

    def chance(self, p: float) -> bool:
        """True with probability `p`."""
        return self.rng.random() < p

    def one(self, values: Sequence[str]) -> str:
        """A value from a list, held out or not."""
        return values[int(self.rng.random() * len(values))]

    def apart(self, values: Sequence[str]) -> str:
        """A value from this stream's part of the list."""
        while True:
            if held_out(value := self.one(values)) == self.held_out:
                return value

    def made_up(self) -> str:
        """A made-up word such as "Toshand", which a model can only copy."""
        while True:
            parts = [self.one(SYLLABLES) for _ in range(2 if self.chance(0.7) else 3)]
            if held_out(word := "".join(parts).capitalize() + self.one(ENDINGS)) == self.held_out:
                return word

    def name(self) -> str:
        """A first name, real or made up."""
        return self.apart(words.NAMES) if self.chance(0.5) else self.made_up()

    def city(self) -> str:
        """A city, real or made up."""
        return self.apart(words.CITIES) if self.chance(0.85) else self.made_up()

    def number(self, most_digits: int = 4) -> str:
        """A whole number. Numbers below 20 are in both streams, others in one."""
        while True:
            digits = 1 + int(self.rng.random() * most_digits)
            value = int(self.rng.random() * 10**digits)
            if value < 20 and (not self.held_out or self.chance(0.3)):
                return str(value)
            if value >= 20 and held_out(str(value)) == self.held_out:
                return str(value)

    def decimal(self, most_digits: int = 4) -> str:
        """A number, in a quarter of cases with decimals."""
        text = self.number(most_digits)
        if self.chance(0.25):
            text += "." + self.one(["5", "25", "75", "1", "2", "3", "4", "6", "7", "8", "9", "05", "125"])
        return text

    def code(self) -> str:
        """A number of three to five digits."""
        while True:
            text = str(int(10**2 + self.rng.random() * (10 ** (3 + int(self.rng.random() * 3)) - 10**2)))
            if held_out(text) == self.held_out:
                return text

    def phrase(self, templates: Sequence[str], polite: bool = True, /, **slots: str) -> str:
        """One of the templates as a user would type it, with its slots filled."""
        for _ in range(400):
            text = self._typed(self.one(templates), polite)
            if held_out(text) == self.held_out:
                break
        return text.format(**slots)

    def _typed(self, text: str, polite: bool) -> str:
        """Varies case, punctuation and politeness around the slots."""
        if self.chance(0.3):
            return text
        if self.chance(0.5):
            text = text.lower() if self.chance(0.6) else text[0].lower() + text[1:]
        if self.chance(0.45):
            text = text.rstrip(".?!")
            if self.chance(0.35):
                text += self.one(["!", "?", "??", ".", "...", " ?", " !", "!!"])
        if polite and self.chance(0.3):
            text = self.one(OPENERS) + text[0].lower() + text[1:]
        elif polite and text[-1].isalpha() and self.chance(0.2):
            text += self.one(CLOSERS)
        return text

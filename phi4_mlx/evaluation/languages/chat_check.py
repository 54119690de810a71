"""Faults of an answer that can be seen without judging its content: its language, a loop, a copied question."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

from phi4_mlx.evaluation.languages.detector import SENTENCE, UNKNOWN, language_shares, prose

FAULTS = {
    "empty": "has no letters; of a model that reasons: its thoughts took all of --max-tokens",
    "short": "has less than half the letters of the question, which asks for more",
    "copy": "repeats the question and adds next to nothing",
    "loop": "repeats itself",
    "language": "is in another language, or in none that is known",
    "mixture": "is partly in another language",
}

_OTHER = 0.05  # of the letters may be in other languages, as names and quotations are
_UNKNOWN = 0.3  # of the letters may be in no language, as abbreviations in Japanese are
_COPIES = 4  # of the same words in a row are a loop
_LOOP_LETTERS = 40  # the shortest loop; four times "ha" is laughter
_LONGEST_PERIOD = 2000  # letters
_SHORT = 0.5  # of the question's letters; the questions ask for a story, a letter, steps
_OWN_LETTERS = 20  # that an answer must add to the question
_SIMILAR = 0.8  # difflib's ratio of an answer to its question, from which on it is a copy


@dataclass(frozen=True)
class Verdict:
    """The fault and the language of an answer.

    Attributes:
        fault: a key of `FAULTS`; "" if nothing is wrong.
        language: the code of the language that most of it is in, or "unknown".
    """

    fault: str
    language: str


def check(answer: str, question: str, language: str) -> Verdict:
    """Checks an answer.

    Args:
        answer: without reasoning. It may have been cut at its end.
        question: as the user asked it.
        language: code of the language that the answer must be in.
    """
    shares = language_shares(answer)
    found = max(shares, key=shares.__getitem__, default=UNKNOWN)
    others = sum(share for code, share in shares.items() if code not in (language, UNKNOWN))
    words, asked = _letters(answer), _letters(question)
    if not words:
        fault = "empty"
    elif _is_copy(words, asked):
        fault = "copy"
    elif _is_loop(words) or _is_shuffled_loop(answer):
        fault = "loop"
    elif found != language:
        fault = "language"
    elif len(words) < _SHORT * len(asked):
        fault = "short"
    elif others > _OTHER or shares.get(UNKNOWN, 0) > _UNKNOWN:
        fault = "mixture"
    else:
        fault = ""
    return Verdict(fault, found)


def _letters(text: str) -> str:
    """The letters of a text: numbers of a list and line breaks do not hide a copy or a loop."""
    return "".join(filter(str.isalpha, text.lower()))


def _is_copy(answer: str, question: str) -> bool:
    if question in answer:
        return len(answer) - len(question) < _OWN_LETTERS
    if len(answer) > 2 * len(question):
        return False
    return SequenceMatcher(None, question, answer, autojunk=False).ratio() >= _SIMILAR


def _is_loop(words: str) -> bool:
    """True if some letters follow each other `_COPIES` times or more."""
    codes = np.frombuffer(words.encode("utf-32-le"), np.uint32)
    for period in range(1, min(len(codes) // _COPIES, _LONGEST_PERIOD) + 1):
        breaks = np.flatnonzero(codes[period:] != codes[:-period])
        edges = np.concatenate([[-1], breaks, [len(codes) - period]])
        longest = int(np.diff(edges).max()) - 1  # letters that equal those one period before
        if longest >= (_COPIES - 1) * period and longest + period >= _LOOP_LETTERS:
            return True
    return False


def _is_shuffled_loop(answer: str) -> bool:
    """True if more than half of a text are sentences that it has had twice before."""
    counts = Counter(words for part in SENTENCE.split(prose(answer)) if (words := _letters(part)))
    again = sum(len(words) * (count - 2) for words, count in counts.items() if count > 2)
    return again > sum(len(words) * count for words, count in counts.items()) / 2

"""The language of a text, among the 23 of Phi-4-mini.

A script of its own gives the language away (Arabic, Hebrew, Thai, Hangul, kana; Han without kana is Chinese). Languages
that share the Latin or the Cyrillic script are told apart by function words and letters: each found counts one, divided
by the languages that have it, and a letter that a language lacks counts against it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from string import ascii_lowercase

from phi4_mlx.evaluation.languages.function_words import (
    CYRILLIC_LETTERS,
    CYRILLIC_WORDS,
    LATIN_LETTERS,
    LATIN_WORDS,
)

UNKNOWN = "unknown"

# First word of a character's Unicode name -> its script.
_SCRIPTS = {
    **{"ARABIC": "Arabic", "HEBREW": "Hebrew", "THAI": "Thai", "HANGUL": "Hangul", "HIRAGANA": "kana"},
    **{"KATAKANA": "kana", "CJK": "Han", "IDEOGRAPHIC": "Han", "LATIN": "Latin", "CYRILLIC": "Cyrillic"},
}
_SINGLE = {"Arabic": "ar", "Hebrew": "he", "Thai": "th", "Hangul": "ko", "kana": "ja"}

# Code, addresses and formulas are the same in any language.
_NO_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]+`|https?://\S+|\S+@\S+\.\w+|\\\[.*?\\\]|\\\(.*?\\\)|\$\$.*?\$\$|<[a-z/][^<>\n]*>", re.S
)
SENTENCE = re.compile(r"(?<=[.!?…])[\s\"'”»)]+|[\n。！？؟।]+")
_WORD = re.compile(r"[^\W\d_]+")
_MARGIN = 0.45  # of the best language over the second, in words that only the best one has
_COVERED = 0.1  # of the words of a text must speak for a language; fewer are another language, or none
_FOREIGN = 0.1  # of the words may have letters that the language lacks, as names do; more are another language
_HAN_SENTENCE = 10  # Han letters without kana that are not Japanese, even in a text with kana


def prose(text: str) -> str:
    """The text without code, addresses and formulas."""
    return _NO_PROSE.sub(" ", text)


def detect(text: str) -> str:
    """The language in which most of a text is written.

    Args:
        text: of any length; a few words may be too little.

    Returns:
        A code of `LANGUAGES`, or UNKNOWN.
    """
    shares = language_shares(text)
    return max(shares, key=shares.__getitem__, default=UNKNOWN)


def language_shares(text: str) -> dict[str, float]:
    """The share of a text's letters in each language.

    A sentence that gives no language away, such as a title, counts for the language of the whole text in its script.

    Args:
        text: of any length.

    Returns:
        Code or UNKNOWN -> share above 0; together they are 1, or nothing if there are no letters.
    """
    text = unicodedata.normalize("NFKC", prose(text))
    whole = _by_script(text)
    main = {script: _closest(script, words) for script, words in whole.items()}
    main["Han"] = "ja" if "kana" in whole else "zh"
    letters: Counter[str] = Counter()
    for sentence in SENTENCE.split(text):
        found = _by_script(sentence)
        for script, words in found.items():
            count = sum(map(len, words))
            if script == "Han":
                language = "zh" if count >= _HAN_SENTENCE and "kana" not in found else main["Han"]
            else:
                language = _closest(script, words)
            letters[main[script] if language == UNKNOWN else language] += count
    total = sum(letters.values())
    return {language: count / total for language, count in letters.items()}


def _by_script(text: str) -> dict[str, list[str]]:
    """Script -> its words in the text; a word of two scripts, as in Japanese, is cut where they meet."""
    found: dict[str, list[str]] = {}
    for word in _WORD.findall(text.lower()):
        for script, letters in groupby(word, _script):
            found.setdefault(script, []).append("".join(letters))
    return found


@cache
def _script(letter: str) -> str:
    first = re.split("[ -]", unicodedata.name(letter, UNKNOWN))[0]
    return _SCRIPTS.get(first, UNKNOWN)


def _closest(script: str, words: Sequence[str]) -> str:
    """The language that words in one script are in; UNKNOWN if none is clear of the others."""
    if script not in _MARKS:
        return _SINGLE.get(script, UNKNOWN)
    marks = _MARKS[script]
    scores = {language: sum(marks.score(language, word) for word in words) for language in marks.words}
    (second, _), (best, language) = sorted((score, language) for language, score in scores.items())[-2:]
    clear = best - second >= _MARGIN and marks.covered(language, words) >= _COVERED
    return language if clear and marks.foreign(language, words) <= _FOREIGN else UNKNOWN


class _Marks:
    """The words and letters that tell the languages of a script apart."""

    def __init__(self, words: Mapping[str, str], letters: Mapping[str, str], plain: str) -> None:
        self.words = {language: frozenset(listed.split()) for language, listed in words.items()}
        self._letters = {language: frozenset(plain + listed) for language, listed in letters.items()}
        self._plain = frozenset(plain)
        self._sharing = Counter(word for listed in self.words.values() for word in listed)

    def score(self, language: str, word: str) -> float:
        """Evidence of a word for a language, from -0.5 to 1.5; 1 for a function word that no other language has."""
        score = 1 / self._sharing[word] if word in self.words[language] else 0.0
        if self._plain.issuperset(word):
            return score
        spelling = [code for code, known in self._letters.items() if known.issuperset(word)]
        return score + (0.5 / len(spelling) if language in spelling else -0.5)

    def covered(self, language: str, words: Sequence[str]) -> float:
        """The share of words that are function words of a language."""
        return sum(word in self.words[language] for word in words) / len(words)

    def foreign(self, language: str, words: Sequence[str]) -> float:
        """The share of words with a letter that a language lacks."""
        return sum(not self._letters[language].issuperset(word) for word in words) / len(words)


_MARKS = {
    "Latin": _Marks(LATIN_WORDS, LATIN_LETTERS, ascii_lowercase),
    "Cyrillic": _Marks(CYRILLIC_WORDS, CYRILLIC_LETTERS, ""),
}

"""The language of a text, among the 23 of Phi-4-mini.

A script of its own gives the language away (Arabic, Hebrew, Thai, Hangul, kana; Han without kana is Chinese). Languages
that share the Latin or the Cyrillic script are told apart by function words and letters: each found counts one, divided
by the languages that have it, and a letter that a language lacks counts against it. A close relative of one of the 23
(Slovak, Catalan, Bulgarian, Persian) may pass for it; most other languages are found to be unknown.
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
    r"```.*?(?:```|\Z)|`[^`\n]+`|https?://\S+|[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9.-]+|"
    r"\\\[.*?\\\]|\\\(.*?\\\)|\$\$.*?\$\$|<[a-z/][^<>\n]*>",
    re.S,
)
SENTENCE = re.compile(r"(?<=[.!?…])[\s\"'”»)]+|[\n。！？؟।]+")
_WORD = re.compile(r"[^\W\d_]+")
_CLEAR = 0.45  # lead over the second language, in words that only the best one has
_CLOSE = 1.5  # lead below which a sentence counts for a language that more of the text is in
_LISTED = 0.04  # of the words must be listed for a language
_COVERED = 0.1  # of the words must speak for a language; fewer are another language, or none
_FOREIGN = 0.2  # of the words may have letters that the language lacks, as names do; more are another language
_LETTER = 0.5  # points for a word with a letter that no other language has, off for one that the language lacks
_RARE = 3  # languages that have a letter, for words with it to speak for them
_HAN_SENTENCE = 16  # Han letters without kana that are not Japanese, even in a text with kana


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

    A sentence that could be in several languages counts for the one that most of the text is in.

    Args:
        text: of any length.

    Returns:
        Code or UNKNOWN -> share above 0; together they are 1, or nothing if there are no letters.
    """
    text = unicodedata.normalize("NFKC", prose(text))
    whole = _by_script(text)
    sentences = [found for part in SENTENCE.split(text) if (found := _by_script(part))]
    letters: Counter[str] = Counter()
    for script in whole:
        if script in _MARKS:
            letters += _shared_script(script, whole[script], [found[script] for found in sentences if script in found])
        elif script == "Han":
            letters += _han(sentences, "kana" in whole)
        else:
            letters[_SINGLE.get(script, UNKNOWN)] += _size(whole[script])
    total = sum(letters.values())
    return {language: count / total for language, count in letters.items()}


def _by_script(text: str) -> dict[str, list[str]]:
    """Script -> its words in the text; a word of two scripts, as in Japanese, is cut where they meet."""
    found: dict[str, list[str]] = {}
    for word in _WORD.findall(text.lower().replace("\u0307", "")):  # the dot of a capital I in Turkish
        for script, letters in groupby(word, _script):
            found.setdefault(script, []).append("".join(letters))
    return found


@cache
def _script(letter: str) -> str:
    first = re.split("[ -]", unicodedata.name(letter, UNKNOWN))[0]
    return _SCRIPTS.get(first, UNKNOWN)


def _size(words: Sequence[str]) -> int:
    return sum(map(len, words))


def _han(sentences: Sequence[Mapping[str, Sequence[str]]], japanese: bool) -> Counter[str]:
    """Letters in Han by language; a Japanese text may have short sentences without kana, such as titles."""
    letters: Counter[str] = Counter()
    for found in sentences:
        if size := _size(found.get("Han", ())):
            own = "kana" in found or (japanese and size < _HAN_SENTENCE)
            letters["ja" if own else "zh"] += size
    return letters


def _shared_script(script: str, whole: Sequence[str], sentences: Sequence[Sequence[str]]) -> Counter[str]:
    """Letters by language in a script that several languages share."""
    marks = _MARKS[script]
    clear: Counter[str] = Counter()
    for words in sentences:
        clear[marks.closest(words)] += _size(words)
    del clear[UNKNOWN]
    main = marks.closest(whole)
    if main == UNKNOWN and clear.total() > _size(whole) / 2:
        main = max(clear, key=clear.__getitem__)
    letters: Counter[str] = Counter()
    for words in sentences:
        spoken = [code for code in marks.close(words, main) if clear[code]]
        letters[max(spoken, key=lambda code: clear[code], default=main)] += _size(words)
    return letters


class _Marks:
    """The words and letters that tell the languages of a script apart."""

    def __init__(self, words: Mapping[str, str], letters: Mapping[str, str], plain: str) -> None:
        self._words = {language: frozenset(listed.split()) for language, listed in words.items()}
        self._letters = {language: frozenset(plain + listed) for language, listed in letters.items()}
        self._plain = frozenset(plain)
        self._sharing = Counter(word for listed in self._words.values() for word in listed)
        self._spelling = Counter(letter for known in self._letters.values() for letter in known)

    def closest(self, words: Sequence[str]) -> str:
        """The language that words are in; UNKNOWN if none is clear of the others."""
        scores = self._scores(words)
        (second, _), (best, language) = sorted((score, language) for language, score in scores.items())[-2:]
        return language if best - second >= _CLEAR and self._possible(language, words) else UNKNOWN

    def close(self, words: Sequence[str], main: str) -> list[str]:
        """The languages that words may be in; `main`, that of the text, if nothing speaks against it."""
        scores = self._scores(words)
        close = [language for language, score in scores.items() if max(scores.values()) - score < _CLOSE]
        return [language for language in close if language == main or self._possible(language, words)]

    def _scores(self, words: Sequence[str]) -> dict[str, float]:
        """Language -> points: 1 for a word that no other language has, less for a shared one."""
        scores = dict.fromkeys(self._words, 0.0)
        for word in words:
            if word in self._sharing:
                for language, listed in self._words.items():
                    if word in listed:
                        scores[language] += 1 / self._sharing[word]
            if not self._plain.issuperset(word):
                rarest = min(self._spelling[letter] for letter in word)
                for language, known in self._letters.items():
                    scores[language] += _LETTER / rarest if known.issuperset(word) else -_LETTER
        return scores

    def _possible(self, language: str, words: Sequence[str]) -> bool:
        """True if enough words are function words of a language, and few have a letter that it lacks."""
        rare = {letter for letter in self._letters[language] if self._spelling[letter] <= _RARE}
        listed = sum(word in self._words[language] for word in words)
        spelled = sum(word not in self._words[language] and not rare.isdisjoint(word) for word in words)
        foreign = sum(not self._letters[language].issuperset(word) for word in words)
        if listed < _LISTED * len(words) or listed + spelled < _COVERED * len(words):
            return False
        return foreign <= _FOREIGN * len(words)


_MARKS = {
    "Latin": _Marks(LATIN_WORDS, LATIN_LETTERS, ascii_lowercase),
    "Cyrillic": _Marks(CYRILLIC_WORDS, CYRILLIC_LETTERS, ""),
}

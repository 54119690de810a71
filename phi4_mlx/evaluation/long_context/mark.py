"""The mark of an answer: values found, against values asked for and wrong values named.

score = right values named / (values asked for + wrong values named). Half of the values asked for is 0.5, and an answer
that lists all values of the text is no full hit. Before values are looked for, both sides are normalised: NFC, digits
of any script as ASCII, case folded (in Turkish with its own i), no vowel points, direction marks or quotation marks, no
separators between thousands. A word counts with prefixes and suffixes, as many languages attach them.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from phi4_mlx.evaluation.long_context.problem import Problem

_NAME = re.compile(r"(?<![A-Za-z0-9])[B-DF-HJ-NP-TV-XZ]{3}(?![A-Za-z0-9])")
_NUMBER = re.compile(r"(?<![\da-z])\d+(?![\da-z])")
_UUID = re.compile(r"(?<![\da-z])[\da-f]{8}-[\da-f]{4}-[\da-f]{4}-[\da-f]{4}-[\da-f]{12}(?![\da-z])")
_THOUSANDS = re.compile(r"(?<!\d)\d{1,3}(?:[ .,'\u2019\u00a0\u202f\u066c]\d{3})+(?!\d)")
_UNWRITTEN = re.compile("[\u0591-\u05c7\u0640\u064b-\u0652\u0670\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_HYPHENS = re.compile("[\u2010-\u2015\u2212]")
_BETWEEN = re.compile(r"[\s,;\u060c\u061b\u3001\uff0c]+")
_AROUND = " \t\r\n.,;:!\"'`*\u3002\u00ab\u00bb\u2018\u2019\u201a\u201c\u201d\u201e\u300c\u300d\u300e\u300f"


@dataclass(frozen=True)
class Mark:
    """The mark of an answer.

    Attributes:
        score: from 0 to 1, by the rule above.
        recall: share of the values asked for that are named.
        exact: 1 if the answer is the values as they are written in the text, and nothing else; else 0.
    """

    score: float
    recall: float
    exact: float


def mark(problem: Problem, answer: str) -> Mark:
    """Marks an answer.

    Args:
        problem: what was asked.
        answer: without reasoning.
    """
    code = problem.language.code
    truths = {normalised(value, code) for value in problem.truths}
    named = _named(problem, normalised(answer, code), answer)
    hits = len(truths & named)
    pieces = [piece.strip(_AROUND) for piece in _BETWEEN.split(unicodedata.normalize("NFC", answer).strip(_AROUND))]
    exact = sorted(pieces) == sorted(problem.truths)
    return Mark(hits / (len(truths) + len(named - truths)), hits / len(truths), float(exact))


def _named(problem: Problem, text: str, answer: str) -> set[str]:
    """The values of the problem's form in a normalised answer."""
    if problem.form == "uuid":
        return set(_UUID.findall(text))
    if problem.form == "name":
        known = {value.lower() for value in (*problem.truths, *problem.wrong)}
        return {word for word in re.findall(r"[a-z0-9]+", text) if word in known} | {
            name.lower() for name in _NAME.findall(answer)
        }
    if problem.form == "word":
        known = {normalised(value, problem.language.code) for value in problem.language.words}
        return {word for word in known if word in text}
    plain = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    shortest = 3 if problem.form == "number" else 1  # shorter ones number the lines of an answer
    return {number for number in _NUMBER.findall(plain) if len(number) >= shortest}


def normalised(text: str, code: str) -> str:
    """A text as values are compared.

    Args:
        text: an answer or a value.
        code: of its language.
    """
    text = _HYPHENS.sub("-", _UNWRITTEN.sub("", unicodedata.normalize("NFC", text)))
    text = "".join(str(unicodedata.decimal(char, char)) for char in text)
    if code == "tr":
        text = text.replace("I", "\u0131").replace("\u0130", "i")
    return unicodedata.normalize("NFC", text.casefold())

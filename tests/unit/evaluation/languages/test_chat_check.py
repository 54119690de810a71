"""Faults of answers."""

from __future__ import annotations

import random

import pytest

from phi4_mlx.evaluation.languages.chat_check import FAULTS, check
from phi4_mlx.evaluation.languages.texts import LANGUAGES
from tests.unit.evaluation.languages.test_detector import ANSWERS

OTHER = {code: ANSWERS["de" if code == "en" else "en"] for code in LANGUAGES}


def fault(answer: str, code: str) -> str:
    found = check(answer, LANGUAGES[code].questions[0], code).fault
    assert found in {"", *FAULTS}
    return found


@pytest.mark.parametrize("code", LANGUAGES)
def test_faults_in_each_language(code: str) -> None:
    answer, question = ANSWERS[code], LANGUAGES[code].questions[0]
    assert fault(answer, code) == ""
    assert fault(answer[: len(answer) * 2 // 3], code) == ""  # cut at the limit of tokens
    assert fault(f"{question}\n\n{answer}", code) == ""  # a question that is repeated before it is answered
    assert fault(question, code) == "copy"
    assert fault(f"**{question.upper()}** OK", code) == "copy"
    assert fault(OTHER[code], code) == "language"
    assert fault(f"{answer}\n\n{OTHER[code][: len(answer) // 2]}", code) == "mixture"
    assert fault(f"{LANGUAGES[code].questions[3]} " * 12, code) == "loop"
    assert fault(answer + LANGUAGES[code].sentences[0] * 4, code) == "loop"
    assert fault(" \n", code) == "empty"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("", "empty"),
        ("42 :-) 🙂", "empty"),
        ("Yes, you should.", "short"),
        ("a" * 200, "loop"),
        ("Bear it in mind. " + "no " * 100, "loop"),
        ("\n".join(f"{n}. Look for a flat that you can afford." for n in range(1, 9)), "loop"),
        ("Ha ha ha ha! That is a good question, and I would say that you should first look for a flat and a job.", ""),
        (
            "What should I bear in mind when moving to a new city? Give me five tips and explain each in a sentence.",
            "copy",
        ),
        ("| a | b |\n| --- | --- |\n| the rent is due | look at what it is and when you have to pay it |\n" * 1, ""),
        ("First of all: “C'est la vie.” " + ANSWERS["en"], ""),
    ],
)
def test_faults_in_english(answer: str, found: str) -> None:
    assert fault(answer, "en") == found


def test_a_loop_in_changing_order_is_found() -> None:
    sentences = ["You should find a flat near the park.", "It is best to ask a friend.", "Do not pay in advance."]
    draw = random.Random(0)
    turns = [sentence for _ in range(8) for sentence in draw.sample(sentences, 3)]
    assert fault(" ".join(turns), "en") == "loop"
    assert fault(" ".join(turns[:3]) + ANSWERS["en"], "en") == ""


def test_a_long_loop_is_found_at_any_period() -> None:
    """Also where it begins late and is cut inside its last copy."""
    for length in (200, 600):
        period = (ANSWERS["en"] * 3)[:length]
        assert fault(ANSWERS["de"] + period * 4 + period[:17], "de") == "loop"
        assert fault(ANSWERS["en"], "en") == ""

"""Questions with lettered options from each public format, and answers found in what a model wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from phi4_mlx.evaluation import lettered, written
from tests.data.evaluation import make


def documents(convert: Callable[[Any], Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from datasets import Dataset

    return list(convert(Dataset.from_list(rows)))


@pytest.mark.parametrize(
    ("convert", "row", "right"),
    [
        (lettered.arc, make.arc(3), "white"),
        (lettered.arc, make.arc(4), "black"),
        (lettered.openbookqa, make.openbookqa(1), "blue"),
        (lettered.hellaswag, make.hellaswag(2), "The wall becomes green."),
        (lettered.piqa, make.piqa(1), "Turn the lid of jar 1 to the left."),
        (lettered.social_iqa, make.social_iqa(2), "Sam was kind"),
        (lettered.winogrande, make.winogrande(0), "cup"),
        (lettered.winogrande, make.winogrande(1), "cup"),
        (lettered.gpqa, make.gpqa(2), "green"),
    ],
)
def test_the_right_option_has_its_letter(convert: Callable[[Any], Any], row: dict[str, Any], right: str) -> None:
    (document,) = documents(convert, [row])
    letter = lettered.answer_letter(document)
    assert lettered.letters(document)[lettered.answer(document)] == letter
    text = lettered.question(document)
    assert f"\n{letter}. {right}\n" in text and text.startswith("Question: ") and text.endswith("\nAnswer:")
    assert text.count("\n") == len(document["options"]) + 2


def test_the_options_of_gpqa_stand_in_an_order_of_their_question() -> None:
    rows = [make.gpqa(number) for number in range(40)]
    found = documents(lettered.gpqa, rows)
    assert found[::-1] == documents(lettered.gpqa, rows[::-1])
    assert {lettered.answer(each) for each in found} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("text", "right", "score"),
    [
        ("Steps. Answer: C", "C", 1),
        ("answer is (b)... no, the answer is (C).", "C", 1),
        ("**Answer: C**", "C", 1),
        ("Answer: \\boxed{C}", "C", 1),
        ("So \\boxed{C}", "C", 1),
        ("Answer: D", "C", 0),
        ("C", "C", 0),
        ("", "C", 0),
    ],
)
def test_the_letter_of_an_answer(text: str, right: str, score: int) -> None:
    document = {"query": "?", "options": list("wxyz"), "right": "ABCD".index(right)}
    assert written.letter(document, [text]) == {"exact_match": score}


@pytest.mark.parametrize(
    ("text", "right", "score"),
    [
        ("It is 7.\n42", 42, 1),
        ("42.", 42, 1),
        ("42.0", 42, 1),
        ("1,234", 1234, 1),
        ("1.234", 1234, 1),
        ("1.234.567,00", 1234567, 1),
        ("12,5", 12.5, 1),
        ("-3", -3, 1),
        ("৪২", 42, 1),
        ("౪౨ ", 42, 1),
        ("４２", 42, 1),
        ("42 of 100", 42, 0),
        ("none", 42, 0),
    ],
)
def test_the_last_number_of_an_answer(text: str, right: float, score: int) -> None:
    assert written.number({"answer_number": right}, [text]) == {"exact_match": score}


@pytest.mark.parametrize(
    ("text", "right", "score"),
    [
        ("So $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", 1),
        ("$\\boxed{\\dfrac12}$", "\\frac{1}{2}", 1),
        ("\\boxed{1}, then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 1),
        ("\\boxed{025}", "25", 1),
        ("\\boxed{1{,}000}", "1000", 1),
        ("\\boxed{1,000}", "1000", 1),
        ("\\boxed{3", "3", 0),
        ("3", "3", 0),
        ("\\boxed{}", "3", 0),
    ],
)
def test_the_last_box_of_an_answer(text: str, right: str, score: int) -> None:
    assert written.boxed({"answer": right}, [text]) == {"exact_match": score}

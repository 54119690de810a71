"""The truth scores 1 in every language and kind; wrong, partial and indiscriminate answers score as the rule says."""

from __future__ import annotations

import random
import unicodedata

import pytest

from phi4_mlx.evaluation.long_context.language import CODES, DEMO, load_language
from phi4_mlx.evaluation.long_context.mark import mark
from phi4_mlx.evaluation.long_context.problem import KINDS, Form, Problem

EVERY = [
    (code, kind, form)
    for code in (*CODES, DEMO)
    for kind in KINDS
    for form in KINDS[kind].forms_in(load_language(code))
]


def problem(code: str, kind: str, form: Form, seed: int = 0) -> Problem:
    return KINDS[kind].make(random.Random(seed), load_language(code), form, 0.5)


@pytest.mark.parametrize(("code", "kind", "form"), EVERY)
def test_the_truth_scores_one_and_other_answers_do_not(code: str, kind: str, form: Form) -> None:
    asked = problem(code, kind, form)
    other = problem(code, kind, form, seed=1)
    listed = asked.language.separator.join(asked.truths)
    whole = mark(asked, listed)
    assert (whole.score, whole.recall, whole.exact) == (1, 1, 1)
    spoken = mark(asked, asked.language.filler[0] + asked.language.joiner + listed)
    assert (spoken.score, spoken.exact) == (1, 0)
    assert mark(asked, asked.language.joiner.join(asked.language.filler)).score == 0
    assert mark(asked, "").score == mark(asked, asked.question).score * 0 == 0
    if not set(asked.truths) & set(other.truths):
        assert mark(asked, ", ".join(other.truths)).score == 0
    if asked.wrong:
        assert mark(asked, ", ".join(asked.wrong)).score == 0
        everything = mark(asked, ", ".join((*asked.wrong, *asked.truths)))
        assert everything.recall == 1 and everything.exact == 0
        assert everything.score == len(asked.truths) / len((*asked.wrong, *asked.truths))
    if len(asked.truths) > 1:
        assert mark(asked, asked.truths[0]).score == 1 / len(asked.truths)


@pytest.mark.parametrize("zero", ["٠", "۰", "०", "๐", "０"])
def test_digits_of_any_script_are_equal(zero: str) -> None:
    asked = problem("ar", "needle", "number")
    written = "".join(chr(ord(zero) + int(digit)) for digit in asked.truths[0])
    found = mark(asked, f"«{written}»")
    assert (found.score, found.exact) == (1, 0)


@pytest.mark.parametrize("separator", [",", ".", " ", "\u202f", "'"])
def test_thousands_may_be_separated(separator: str) -> None:
    asked = problem("de", "needle", "number")
    (value,) = asked.truths
    assert mark(asked, f"{value[:2]}{separator}{value[2:]}").score == 1


def test_numbered_lines_are_no_wrong_values() -> None:
    asked = problem("en", "needle-values", "number")
    lines = "\n".join(f"{n}. {value}" for n, value in enumerate(asked.truths, 1))
    assert mark(asked, lines).score == 1


def test_a_list_of_numbers_without_spaces_is_not_one_number() -> None:
    asked = problem("en", "needle-values", "number")
    assert mark(asked, ",".join(asked.truths)).score == 1


def test_guesses_at_a_count_share_the_mark() -> None:
    asked = problem("en", "count", "count")
    assert mark(asked, "2, 3, 4, 5, 6, 7, 8, 9").score == 1 / 8


def test_case_composition_points_and_direction_do_not_count() -> None:
    turkish = problem("tr", "count-common", "word")
    upper = [word.replace("i", "İ").upper() for word in turkish.truths]  # dotless i becomes I
    assert mark(turkish, ", ".join(upper)).score == 1
    czech = problem("cs", "count-common", "word")
    assert mark(czech, unicodedata.normalize("NFD", ", ".join(czech.truths))).score == 1
    hebrew = problem("he", "needle", "word")
    assert mark(hebrew, "\u200f" + "\u05b8".join(hebrew.truths[0]) + "\u200f").score == 1
    russian = problem("ru", "needle", "uuid")
    assert mark(russian, russian.truths[0].upper().replace("-", "\u2011")).score == 1


def test_a_word_may_have_a_suffix_and_a_number_may_not() -> None:
    finnish = problem("fi", "needle", "word")
    assert mark(finnish, f"Koodi on {finnish.truths[0]}n.").score == 1
    number = problem("fi", "needle", "number")
    assert mark(number, number.truths[0] + "0").score == 0


def test_an_invented_name_is_a_wrong_one() -> None:
    asked = problem("en", "chain-names", "name")
    assert mark(asked, ", ".join((*asked.truths, "QZW"))).score == 4 / 5
    assert mark(asked, ", ".join(asked.truths).lower()).score == 1

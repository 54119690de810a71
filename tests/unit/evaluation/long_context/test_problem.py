"""The hidden sentences of each kind: their values, where they stand, and how often."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from phi4_mlx.evaluation.long_context.language import load_language
from phi4_mlx.evaluation.long_context.problem import KINDS, Form, Problem, values

ENGLISH = load_language("en")


def problems(kind: str, depth: float = 0.25, count: int = 20) -> list[Problem]:
    forms = KINDS[kind].forms_in(ENGLISH)
    return [KINDS[kind].make(random.Random(n), ENGLISH, forms[n % len(forms)], depth) for n in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_fixes_the_problem_and_the_first_sentence_stands_at_the_depth(kind: str) -> None:
    made = problems(kind)
    assert made == problems(kind) and len({problem.inserts for problem in made}) == len(made)
    for problem in made:
        assert problem.kind == kind and not set(problem.truths) & set(problem.wrong)
        assert problem.inserts[0].depth == 0.25 and all(0 <= insert.depth <= 1 for insert in problem.inserts)


@pytest.mark.parametrize("kind", ["needle", "needle-distracted", "needle-values", "needle-keys"])
def test_each_value_of_a_needle_is_hidden_once(kind: str) -> None:
    for problem in problems(kind):
        for value in (*problem.truths, *problem.wrong):
            assert sum(value in insert.text for insert in problem.inserts) == 1
        assert len(problem.inserts) == len(problem.truths) + len(problem.wrong)
        assert len(problem.wrong) == (0 if kind == "needle" else 4)


@pytest.mark.parametrize("kind", ["chain-value", "chain-names"])
def test_a_chain_leads_from_the_value_to_each_name(kind: str) -> None:
    for problem in problems(kind):
        value_of: dict[str, str] = {}
        for insert in problem.inserts:
            words = insert.text.rstrip(".").split()
            value_of[words[2]] = value_of.get(words[-1], words[-1])
        depths = [insert.depth for insert in problem.inserts[:4]]
        assert depths == sorted(depths) and depths[-1] == 1
        if kind == "chain-value":
            name = problem.question.split("variable ")[1].split("?")[0]
            assert (value_of[name],) == problem.truths
        else:
            value = problem.question.split("value ")[1].split("?")[0]
            assert sorted(problem.truths) == sorted(name for name in value_of if value_of[name] == value)


def test_counts_are_those_of_the_text() -> None:
    for problem in problems("count"):
        items = Counter(insert.text.split(": ")[1] for insert in problem.inserts)
        word = problem.question.split("“")[1].split("”")[0]
        assert problem.truths == (str(items[f"{word}."]),)
    for problem in problems("count-common"):
        items = Counter(insert.text.split(": ")[1].rstrip(".") for insert in problem.inserts)
        first, rest = items.most_common()[:3], items.most_common()[3:]
        assert sorted(word for word, _ in first) == sorted(problem.truths)
        assert min(count for _, count in first) >= 2 * max(count for _, count in rest)


@pytest.mark.parametrize("form", ["word", "number", "uuid", "name"])
def test_values_differ(form: Form) -> None:
    found = values(random.Random(0), ENGLISH, form, 8)
    assert len(set(found)) == 8
    assert {len(value) for value in found} <= {"word": set(range(20)), "number": {5}, "uuid": {36}, "name": {3}}[form]

"""Paired tests: by hand, by enumeration, and against scipy."""

from __future__ import annotations

import itertools
import random

import pytest

from phi4_mlx.evaluation.paired import EXACT, paired_test


def test_mcnemar_counts_only_the_documents_that_differ() -> None:
    first, second = [1, 0, 0, 0, 0, 0, 1, 1, 0], [1, 0, 1, 1, 1, 1, 1, 0, 1]
    found = paired_test(first, second)
    assert (found.wins, found.losses, found.count) == (1, 5, 9)
    assert found.p_value == pytest.approx(2 * (1 + 6) / 2**6)  # 0 or 1 of 6, on both sides
    assert found.difference == pytest.approx(4 / 9) and found.test == "McNemar, exact"


def test_equal_runs_differ_by_nothing() -> None:
    for scores in ([1, 0, 1], [0.5, 0.25, 1]):
        found = paired_test(scores, scores)
        assert (found.p_value, found.difference, found.wins, found.losses) == (1, 0, 0, 0)


def test_few_scores_are_compared_by_every_sign_flip() -> None:
    first, second = [0.1, 0.5, 0.25, 0.9, 0.3], [0.3, 0.4, 0.75, 1.0, 0.9]
    differences = [two - one for one, two in zip(first, second, strict=True)]
    sums = [
        sum(sign * each for sign, each in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=5)
    ]
    expected = sum(abs(each) >= abs(sum(differences)) - 1e-12 for each in sums) / len(sums)
    found = paired_test(first, second)
    assert found.p_value == pytest.approx(expected) and found.test == "permutation, exact"


def test_many_scores_are_compared_by_drawn_sign_flips() -> None:
    draw = random.Random(3)
    first = [draw.random() for _ in range(4 * EXACT)]
    second = [each + draw.gauss(0.05, 0.2) for each in first]
    found = paired_test(first, second)
    from scipy.stats import ttest_rel

    assert found.p_value == pytest.approx(ttest_rel(first, second).pvalue, abs=0.03)
    assert found.stderr is not None and found.p_value == paired_test(first, second).p_value
    assert paired_test(first, [each + 1 for each in first]).p_value == pytest.approx(1 / 10_001)


def test_one_document_is_no_evidence() -> None:
    assert paired_test([0], [1]).p_value == 1 and paired_test([0], [1]).stderr is None

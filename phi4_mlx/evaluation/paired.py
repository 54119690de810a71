"""Paired tests of two models on the same documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DRAWS = 10_000  # of sign flips; the smallest p-value they can find is 1 / (DRAWS + 1)
EXACT = 16  # differences of which every sign flip is tried


@dataclass(frozen=True)
class Paired:
    """A paired comparison of two runs.

    Attributes:
        count: documents.
        first: mean score of the first run.
        second: mean score of the second run.
        wins: documents on which the first scores more.
        losses: documents on which the second scores more.
        stderr: standard error of the difference of the means; None for one document.
        p_value: probability of a difference at least as large if the runs were alike; two-sided.
        test: the name of the test.
    """

    count: int
    first: float
    second: float
    wins: int
    losses: int
    stderr: float | None
    p_value: float
    test: str

    @property
    def difference(self) -> float:
        """The second mean less the first."""
        return self.second - self.first


def paired_test(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Paired:
    """Compares the scores of two runs, document by document.

    Scores that are all 0 or 1 are compared by McNemar's exact test: the documents on which the runs differ are as
    likely to fall to either. Other scores are compared by a permutation test that flips the signs of differences.

    Args:
        first: scores of the first run; at least one.
        second: scores of the second run on the same documents.
        seed: of the sign flips.

    Source: McNemar, Psychometrika 12 (1947); Fisher, The Design of Experiments (1935), section 21.
    """
    count = len(first)
    differences = [two - one for one, two in zip(first, second, strict=True)]
    wins, losses = sum(each < 0 for each in differences), sum(each > 0 for each in differences)
    mean = math.fsum(differences) / count
    spread = math.fsum((each - mean) ** 2 for each in differences)
    stderr = math.sqrt(spread / (count - 1) / count) if count > 1 else None
    if {*first, *second} <= {0, 1}:
        p_value, test = _mcnemar(wins, losses), "McNemar, exact"
    else:
        p_value, test = _permutation([each for each in differences if each], seed)
    return Paired(count, math.fsum(first) / count, math.fsum(second) / count, wins, losses, stderr, p_value, test)


def _mcnemar(wins: int, losses: int) -> float:
    """Two-sided p-value of a fair coin that fell so; in integers, as 2**documents is beyond a float."""
    differing = wins + losses
    tail = ways = 1  # of `differing` documents, none for one side
    for each in range(1, min(wins, losses) + 1):
        ways = ways * (differing - each + 1) // each
        tail += ways
    return float(min(1.0, 2 * tail / 2**differing))


def _permutation(differences: Sequence[float], seed: int) -> tuple[float, str]:
    """(p-value, name of the test) of the hypothesis that each difference is as likely as its negative."""
    if not differences:
        return 1.0, "permutation"
    import numpy as np

    values = np.asarray(differences)
    observed = abs(values.sum()) * (1 - 1e-9)  # sums in another order differ in the last bits
    if len(values) <= EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
        return float((np.abs(signs @ values) >= observed).mean()), "permutation, exact"
    random, extreme = np.random.default_rng(seed), 0
    for _ in range(DRAWS):
        extreme += int(abs(values @ (1 - 2 * random.integers(0, 2, len(values)))) >= observed)
    return (extreme + 1) / (DRAWS + 1), f"permutation, {DRAWS:,} draws"

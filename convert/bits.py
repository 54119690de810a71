"""Bits of each matrix under a budget: the multiple-choice knapsack, solved exactly.

The KL of a whole model is close to the sum of the KLs with each matrix alone quantised, so the choice is linear. States
are pairs of bytes and KL over the matrices so far. A state is dropped if another one is no larger in both, or if the
bound of its Lagrangian relaxation already exceeds a solution at hand.

Source: the bound is that of M. Fisher, The Lagrangian Relaxation Method for Solving Integer Programming Problems, 1981.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi4_mlx.errors import RequestError

from .quantize import Scheme

SCALE_BITS = 32  # of a scale and a bias, counted in 16 bits each whatever their dtype
_HALVINGS = 100  # of the interval that holds the multiplier

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Candidate:
    """One matrix in one scheme.

    Attributes:
        path: the path of its layer.
        scheme: its quantisation.
        numbers: how many numbers are packed, padding included.
        kl: KL divergence in nats per token from the unquantised model, with this matrix alone quantised.
        error: squared error of its outputs, relative to their square.
    """

    path: str
    scheme: Scheme
    numbers: int
    kl: float
    error: float

    @property
    def bits_per_weight(self) -> float:
        """Bits that a number takes with its share of scale and bias."""
        return self.scheme.bits + SCALE_BITS / self.scheme.group_size

    @property
    def cost_bits(self) -> int:
        """Bits that the matrix takes, scales and biases counted in 16 bits each."""
        return self.numbers * self.scheme.bits + self.numbers // self.scheme.group_size * SCALE_BITS

    @property
    def nbytes(self) -> int:
        """Bytes of `cost_bits`."""
        return self.cost_bits // 8


def choose_bits(
    candidates: Mapping[str, Sequence[Candidate]],
    bits_per_weight: float,
    more_bytes: Callable[[Mapping[str, Candidate]], int] = lambda chosen: 0,
) -> dict[str, Candidate]:
    """Chooses one candidate of each matrix: the least sum of KL whose size is within the budget.

    Args:
        candidates: path -> the schemes that were tried; none is empty.
        bits_per_weight: the budget, as the mean over all numbers, scales and biases included.
        more_bytes: bytes that a choice takes besides, for example in the header of its file; they count too, but never
            exclude the smallest candidates or, within the budget, the largest ones.

    Returns:
        Path -> its candidate, in the order of `candidates`. Of equal sums the smaller size is taken; the result does
        not depend on the order of the paths.

    Raises:
        RequestError: the budget is less than the smallest candidates take.
    """
    paths = sorted(candidates)
    numbers = sum(candidates[path][0].numbers for path in paths)
    items = [sorted(candidates[path], key=lambda each: (each.cost_bits, each.kl)) for path in paths]
    budget = math.floor(bits_per_weight * numbers + 0.5 / max(1, numbers))  # 4.7 * numbers may end just below a whole
    least, most = (sum(options[end].cost_bits for options in items) for end in (0, -1))
    if least > budget:
        named = math.ceil(least / numbers * 100 - 1e-9) / 100
        bits = " to ".join(map(str, sorted({options[0].scheme.bits for options in items})))
        raise RequestError(
            f"a budget of {bits_per_weight:g} bits per weight is too small: the smallest package, with {bits} bits per "
            f"number and their scales, takes {named:g}; use --q-bpw {named:g} or more"
        )
    kls = [np.array([each.kl for each in options], np.float64) for options in items]
    costs = [np.array([each.cost_bits for each in options], np.int64) for options in items]
    limit = budget
    while True:
        picks = _solve(kls, costs, limit)
        chosen = {path: options[pick] for path, options, pick in zip(paths, items, picks, strict=True)}
        spent = sum(each.cost_bits for each in chosen.values())
        if spent + 8 * more_bytes(chosen) <= budget or spent in (least, most):
            return {path: chosen[path] for path in candidates}
        limit = spent - 1


def _solve(kls: Sequence[Floats], costs: Sequence[Integers], budget: int) -> list[int]:
    """The option of each item with the least sum of KL, of those the least cost, at a cost of at most `budget`."""
    multiplier, incumbent = _relaxed(kls, costs, budget)
    prices = [float((kl + multiplier * cost).min()) for kl, cost in zip(kls, costs, strict=True)]
    rest = np.concatenate([np.cumsum(prices[::-1])[::-1], [0.0]])  # of the items not yet placed
    cheapest = np.concatenate([np.cumsum([cost.min() for cost in costs][::-1])[::-1], [0]])
    slack = 1e-9 * (abs(incumbent) + abs(multiplier * budget)) + 1e-300
    sums, spent = np.zeros(1), np.zeros(1, np.int64)
    steps: list[tuple[Integers, Integers]] = []  # of each state: the state before, the option
    for number, (kl, cost) in enumerate(zip(kls, costs, strict=True), 1):
        new_sums, new_spent = (sums[:, None] + kl).ravel(), (spent[:, None] + cost).ravel()
        bound = new_sums + multiplier * (new_spent - budget) + rest[number]
        alive = np.flatnonzero((new_spent + cheapest[number] <= budget) & (bound <= incumbent + slack))
        alive = alive[np.lexsort((new_sums[alive], new_spent[alive]))]
        lowest = np.minimum.accumulate(new_sums[alive])
        alive = alive[np.concatenate([[True], lowest[1:] < lowest[:-1]])]
        sums, spent = new_sums[alive], new_spent[alive]
        steps.append((alive // len(kl), alive % len(kl)))
    state, picks = int(sums.argmin()), []
    for before, option in reversed(steps):
        picks.append(int(option[state]))
        state = int(before[state])
    return picks[::-1]


def _relaxed(kls: Sequence[Floats], costs: Sequence[Integers], budget: int) -> tuple[float, float]:
    """The best multiplier, in KL per bit, and the KL of the feasible choice that it gives."""

    def choice(multiplier: float) -> tuple[int, float]:
        picks = [int((kl + multiplier * cost).argmin()) for kl, cost in zip(kls, costs, strict=True)]
        total = sum(int(cost[pick]) for cost, pick in zip(costs, picks, strict=True))
        return total, sum(float(kl[pick]) for kl, pick in zip(kls, picks, strict=True))

    low, high = 0.0, 1.0
    cost, found = choice(low)
    if cost <= budget:
        return low, found
    while choice(high)[0] > budget:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if choice(middle)[0] <= budget else (middle, high)
    return high, choice(high)[1]

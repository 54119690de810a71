"""Bits of each matrix: the best choice within the budget, against every choice there is."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence

import pytest

from phi4_mlx.convert.bits import Candidate, choose_bits
from phi4_mlx.convert.quantize import Scheme
from phi4_mlx.errors import RequestError

WIDTHS = (3, 4, 5, 6, 8)
Measured = dict[str, list[Candidate]]


def candidates(kls: Mapping[str, Sequence[float]], numbers: dict[str, int], group_size: int = 64) -> Measured:
    return {
        path: [
            Candidate(path, Scheme("affine", bits, group_size), numbers[path], kl, kl)
            for bits, kl in zip(WIDTHS, own, strict=False)
        ]
        for path, own in kls.items()
    }


def drawn(rng: random.Random, count: int, group_size: int = 64) -> Measured:
    """Random matrices whose KL falls sevenfold a bit, not always monotonically."""
    numbers = {f"layer{n}": rng.choice([1, 3, 4, 4, 7, 20]) * 64 * rng.randrange(1, 9) for n in range(count)}
    kls = {path: [rng.lognormvariate(-2 * bits, 2) for bits in WIDTHS] for path in numbers}
    return candidates(kls, numbers, group_size)


def best(measured: Measured, bits_per_weight: float) -> float:
    """The least sum of KL over all choices within the budget."""
    numbers = sum(options[0].numbers for options in measured.values())
    return min(
        math.fsum(each.kl for each in choice)
        for choice in itertools.product(*measured.values())
        if sum(each.cost_bits for each in choice) <= bits_per_weight * numbers
    )


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_within_the_budget_is_better(seed: int) -> None:
    rng = random.Random(seed)
    group_size = rng.choice([32, 64])
    measured = drawn(rng, rng.randrange(1, 6), group_size)
    numbers = sum(options[0].numbers for options in measured.values())
    for bits_per_weight in (3.5, 3.9, 4.5, 4.72, 5.25, 6.0, 8.4, 16.0):
        bits_per_weight += 32 / group_size - 0.5
        chosen = choose_bits(measured, bits_per_weight)
        assert list(chosen) == list(measured)
        assert all(chosen[path] in measured[path] for path in measured)
        assert sum(each.cost_bits for each in chosen.values()) <= bits_per_weight * numbers
        assert math.isclose(sum(each.kl for each in chosen.values()), best(measured, bits_per_weight), rel_tol=1e-9)


def true_shapes() -> Measured:
    """The matrices of Phi-4-mini: 32 layers, and the embedding, which is the head too."""
    numbers = {"model.embed_tokens": 200064 * 3072}
    for n in range(32):
        numbers |= {f"model.layers.{n}.qkv": 5120 * 3072, f"model.layers.{n}.o": 3072 * 3072}
        numbers |= {f"model.layers.{n}.gate_up": 16384 * 3072, f"model.layers.{n}.down": 3072 * 8192}
    rng = random.Random(0)
    kls = {path: [rng.lognormvariate(-1.4 * bits, 1.5) for bits in WIDTHS] for path in numbers}
    return candidates(kls, numbers)


def test_the_true_shapes_never_take_more_than_plain_4_bits_and_use_the_budget() -> None:
    measured = true_shapes()
    plain = {path: next(each for each in own if each.scheme.bits == 4) for path, own in measured.items()}
    chosen = choose_bits(measured, 4.5)
    sizes = [sum(each.nbytes for each in choice.values()) for choice in (chosen, plain)]
    assert sizes[0] <= sizes[1] < 1.0005 * sizes[0]
    assert sum(each.kl for each in chosen.values()) < 0.75 * sum(each.kl for each in plain.values())
    assert len({each.scheme.bits for each in chosen.values()}) > 3


def test_the_order_of_the_matrices_does_not_matter() -> None:
    measured = true_shapes()
    turned = dict(reversed([(path, own[::-1]) for path, own in measured.items()]))
    assert choose_bits(turned, 4.6) == choose_bits(measured, 4.6)
    assert list(choose_bits(turned, 4.6)) == list(turned)


def test_equal_sums_take_the_smaller_size_and_ties_do_not_fail() -> None:
    measured = candidates({"a": [0.0] * 5, "b": [0.0] * 5}, {"a": 64, "b": 64})
    assert [each.scheme.bits for each in choose_bits(measured, 6.5).values()] == [3, 3]
    measured = candidates({"a": [1, 1, 1, 1, 1], "b": [5, 4, 4, 4, 4]}, {"a": 64, "b": 64})
    assert [each.scheme.bits for each in choose_bits(measured, 8.5).values()] == [3, 4]


def test_a_budget_met_exactly_is_met() -> None:
    measured = candidates({"a": [9, 1, 0.9], "b": [9, 1, 0.9]}, {"a": 3072 * 3072, "b": 3072 * 1024})
    assert {each.scheme.bits for each in choose_bits(measured, 4.5).values()} == {4}
    third = candidates({"a": [9, 1], "b": [9, 1], "c": [9, 8]}, {"a": 64, "b": 64, "c": 64})
    assert [each.scheme.bits for each in choose_bits(third, 3.5 + 2 / 3).values()] == [4, 4, 3]


def test_bytes_besides_the_matrices_count_too() -> None:
    measured = candidates({"a": [9, 1, 0.1], "b": [1.5, 1, 0.9]}, {"a": 64, "b": 64})
    assert [each.scheme.bits for each in choose_bits(measured, 4.5).values()] == [5, 3]

    def longer(chosen: Mapping[str, Candidate]) -> int:
        return sum(each.scheme.bits > 4 for each in chosen.values())

    assert [each.scheme.bits for each in choose_bits(measured, 4.5, longer).values()] == [4, 3]
    assert [each.scheme.bits for each in choose_bits(measured, 4.5, lambda chosen: 1000).values()] == [3, 3]
    assert [each.scheme.bits for each in choose_bits(measured, 4.5, lambda chosen: -9).values()] == [5, 3]


def test_a_budget_above_the_largest_takes_the_best() -> None:
    measured = candidates({"a": [5, 4, 3, 2, 1], "b": [5, 4, 3, 2, 1]}, {"a": 64, "b": 128})
    for bits_per_weight in (16, 8.5):  # the largest take 8.5
        assert {each.scheme.bits for each in choose_bits(measured, bits_per_weight, len).values()} == {8}


def test_a_budget_below_the_smallest_is_refused_with_the_least() -> None:
    measured = candidates({"a": [2, 1], "b": [2, 1]}, {"a": 64, "b": 128}, group_size=32)
    refusal = r"4\.25 bits per weight is too small.*3 to 8 bits .*--q-bpw 4\.72 "
    with pytest.raises(RequestError, match=refusal) as caught:
        choose_bits({**measured, "c": [Candidate("c", Scheme("affine", 8, 32), 32, 0.0, 0.0)]}, 4.25)
    assert "\n" not in str(caught.value)

"""Samplers and logits processors against their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.generation.sampling import make_logits_processors, make_sampler

PROBS = np.array([0.40, 0.25, 0.15, 0.10, 0.06, 0.04])
LOGITS = mx.array(np.log(PROBS), mx.float32)[None] + 3.0  # shifted, because logits need not be normalised


def frequencies(sampler: Callable[[mx.array], mx.array], n: int = 4000) -> np.ndarray:
    """The frequencies of the six tokens in n draws."""
    tokens = sampler(mx.broadcast_to(LOGITS, (n, 6)))
    return np.bincount(np.array(tokens), minlength=6) / n


def test_the_default_sampler_takes_the_likeliest_token() -> None:
    assert make_sampler()(LOGITS).tolist() == [0]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 6),
        ({"top_k": 2}, 2),
        ({"top_k": 100}, 6),
        ({"top_p": 0.39}, 1),
        ({"top_p": 0.41}, 2),
        ({"top_p": 0.79}, 3),
        ({"top_p": 0.81}, 4),
        ({"top_p": 0.0}, 6),
        ({"top_p": 1e-17}, 1),
        ({"top_p": 5e-324}, 1),
        ({"min_p": 0.36}, 3),
        ({"min_p": 0.11}, 5),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.3}, 3),
    ],
)
def test_frequencies_follow_the_truncated_distribution(options: dict[str, Any], kept: int) -> None:
    expected = np.where(np.arange(6) < kept, PROBS, 0)
    found = frequencies(make_sampler(temp=1.0, seed=7, **options))
    assert np.abs(found - expected / expected.sum()).max() < 0.03
    assert (found[kept:] == 0).all()


@pytest.mark.parametrize(("options", "kept"), [({"top_k": 1}, 1), ({"top_k": 3}, 3), ({"top_p": 0.3}, 2)])
def test_equally_likely_tokens_are_truncated_to_the_requested_number(options: dict[str, Any], kept: int) -> None:
    tokens = make_sampler(temp=1.0, seed=3, **options)(mx.zeros((2000, 6)))
    assert len(set(tokens.tolist())) == kept


@pytest.mark.parametrize("temp", [1e-3, 1e-30, 1e-39, 1e-300])
def test_the_smallest_temperatures_take_the_likeliest_token(temp: float) -> None:
    tokens = make_sampler(temp=temp, top_p=0.9, seed=1)(mx.broadcast_to(LOGITS[:, ::-1], (100, 6)))
    assert set(tokens.tolist()) == {5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.95}, {"top_p": 0.8}, {"top_p": 0.9, "min_p": 0.05}, {"top_p": 0.3}, {"top_p": 0.9, "top_k": 700}],
)
def test_a_large_vocabulary_follows_the_truncated_distribution(options: dict[str, Any]) -> None:
    """Compares draws, most of which need no sort, with the definition in NumPy by chi-squared."""
    V, n = 1500, 40_000
    logits = np.random.default_rng(5).normal(size=V).astype(np.float32) * 1.5
    order = np.argsort(-logits, kind="stable")[: options.get("top_k", V)]
    probs = np.exp(logits[order] / 0.8 - logits.max() / 0.8)
    probs /= probs.sum()
    kept = (np.cumsum(probs) - probs < options["top_p"]) & (probs >= options.get("min_p", 0) * probs.max())
    expected = np.zeros(V)
    expected[order[kept]] = probs[kept] / probs[kept].sum()
    sampler = make_sampler(0.8, seed=11, **options)
    drawn = np.concatenate([np.array(sampler(mx.broadcast_to(mx.array(logits), (500, V)))) for _ in range(n // 500)])
    found = np.bincount(drawn, minlength=V) / n
    assert (found[expected == 0] == 0).all()
    likely = expected * n >= 10  # chi-squared needs enough expected draws of each token
    statistic = (((found - expected) ** 2 / np.where(expected, expected, 1)) * n)[likely].sum()
    freedom = likely.sum() - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_equally_likely_tokens_of_a_large_vocabulary_are_truncated_to_the_first() -> None:
    tokens = make_sampler(temp=1.0, top_p=0.8, seed=3)(mx.zeros((4000, 1000)))
    assert max(tokens.tolist()) < 801 and len(set(tokens.tolist())) > 700


@pytest.mark.slow
def test_small_probabilities_in_a_large_vocabulary_are_not_lost() -> None:
    """A running sum in single precision over the whole vocabulary would lose them."""
    V = 200_064
    logits = mx.zeros((V,)).at[mx.arange(100_000, V)].add(math.log(3))
    tokens = np.concatenate([np.array(make_sampler(1.0, top_p=0.99, seed=n)(logits[None])) for n in range(300)])
    share = (tokens >= 100_000).mean()
    expected = 3 * 100_064 / (100_000 + 3 * 100_064)
    assert abs(share - expected / 0.99) < 0.07


def test_temperature_is_applied_before_the_truncation() -> None:
    tempered = PROBS**2 / (PROBS**2).sum()  # temp 0.5: 0.59, 0.23, 0.08, ...
    found = frequencies(make_sampler(temp=0.5, top_p=0.8, seed=1))
    assert (found[2:] == 0).all()
    assert found[0] == pytest.approx(tempered[0] / tempered[:2].sum(), abs=0.03)


def test_a_seed_makes_draws_repeatable_whatever_the_global_state() -> None:
    a, b = make_sampler(1.0, seed=3), make_sampler(1.0, seed=3)
    first = [a(LOGITS).item() for _ in range(40)]
    mx.random.seed(99)
    assert [b(LOGITS).item() for _ in range(40)] == first
    assert len(set(first)) > 1
    c = make_sampler(1.0, seed=4)
    assert [c(LOGITS).item() for _ in range(40)] != first


@pytest.mark.parametrize(
    "options",
    [
        {"temp": math.nan}, {"temp": -0.1}, {"temp": math.inf}, {"temp": "1"}, {"temp": True}, {"top_p": 1.1},
        {"top_p": -1}, {"min_p": math.nan}, {"top_k": -1}, {"top_k": 1.5}, {"top_k": 10**12}, {"seed": -1},
        {"seed": 2**64},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(options))} must be a .*number from"):
        make_sampler(**{"temp": 1.0, **options})


def processed(tokens: list[int], **options: Any) -> list[float]:
    (process,) = make_logits_processors(**options)
    return process(mx.array(tokens), mx.array([[2.0, -2.0, 1.0, 0.5]]))[0].tolist()


def test_processors_follow_their_formulas() -> None:
    assert processed([0], logit_bias={1: 5.0, 3: -1.0}) == [2.0, 3.0, 1.0, -0.5]
    assert processed([0, 1], repetition_penalty=2.0) == [1.0, -4.0, 1.0, 0.5]
    assert processed([0, 1], repetition_penalty=2.0, repetition_context_size=1) == [2.0, -4.0, 1.0, 0.5]
    assert processed([0, 0, 2], presence_penalty=0.5) == [1.5, -2.0, 0.5, 0.5]
    assert processed([0, 0, 2], frequency_penalty=0.5) == [1.0, -2.0, 0.5, 0.5]
    assert make_logits_processors() == []


def test_invalid_processor_options_are_refused() -> None:
    with pytest.raises(RequestError, match="99999999 is outside the vocabulary of 4"):
        processed([0], logit_bias={99999999: 5.0})
    with pytest.raises(RequestError, match="logit_bias token"):
        make_logits_processors(logit_bias={-1: 5.0})
    with pytest.raises(RequestError, match="repetition_penalty"):
        make_logits_processors(repetition_penalty=math.nan)
    with pytest.raises(RequestError, match="repetition_context_size"):
        make_logits_processors(repetition_penalty=1.1, repetition_context_size=0)

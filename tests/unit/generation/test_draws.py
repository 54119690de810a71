"""Draws from a head that is split over ranks are those from all logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.errors import CheckpointError
from phi4_mlx.generation.draws import apply_processors, draw, wanted
from phi4_mlx.generation.sampling import Draw, LogitsProcessor, make_logits_processors, make_sampler
from phi4_mlx.models.split_logits import LEAST, SplitLogits, top

V, PARTS = 3000, ((0, 1000), (1000, 2008), (2008, 3000))


class SplitHead:
    """A head over three ranks that are all in this process; the hidden states are the logits."""

    def __init__(self) -> None:
        self.asked: list[int] = []  # logits of each rank

    def candidates(self, hidden: mx.array, count: int = LEAST, temps: Sequence[float] = ()) -> SplitLogits:
        self.asked.append(count)
        ranks = [top(hidden[:, start:end].astype(mx.float32), count, start, temps) for start, end in PARTS]
        return SplitLogits.of(self, hidden, mx.stack(ranks), temps, PARTS)

    def logits(self, hidden: mx.array) -> mx.array:
        self.asked.append(V)
        return hidden


def random_logits(rows: int, spread: float, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(rows, V)) * spread, mx.float32)


def both(
    logits: mx.array,
    sampler: dict[str, Any] | None,
    mask: mx.array | None = None,
    processors: Sequence[LogitsProcessor] = (),
    ids: Sequence[int] = (),
) -> tuple[list[int], list[int], list[int]]:
    """Tokens from all logits, tokens from the split head, and what that asked its ranks for."""

    def made() -> Draw | None:
        return None if sampler is None else make_sampler(**sampler)

    model, tokens, chosen = SplitHead(), mx.array(list(ids), mx.int32), made()
    split = model.candidates(logits, *wanted([chosen]))
    if processors:
        one, other = (apply_processors(processors, tokens, each) for each in (logits, split))
        return draw(one, made(), mask).numbers(), draw(other, chosen, mask).numbers(), model.asked
    return draw(logits, made(), mask).numbers(), draw(split, chosen, mask).numbers(), model.asked


SAMPLERS: list[dict[str, Any] | None] = [
    None,
    {"temp": 1.0},
    {"temp": 0.6},
    {"temp": 1.7},
    {"temp": 0.8, "top_k": 40},
    {"temp": 1.0, "top_k": 700},
    {"temp": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temp": 1.0, "top_p": 0.95},
    {"temp": 0.7, "top_p": 0.8},
    {"temp": 1.5, "top_p": 0.9, "min_p": 0.01},
    {"temp": 1.0, "top_p": 0.4},
    {"temp": 1.0, "min_p": 0.1},
    {"temp": 0.9, "min_p": 1e-4},
]


@pytest.mark.parametrize("spread", [0.5, 4.0])
@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
def test_a_split_head_draws_what_all_logits_do(settings: dict[str, Any] | None, spread: float) -> None:
    for seed in range(4):
        given = settings and {**settings, "seed": seed}
        whole, split, _ = both(random_logits(5, spread, seed), given)
        assert split == whole


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
def test_logits_of_half_precision_are_drawn_alike(settings: dict[str, Any] | None, dtype: mx.Dtype) -> None:
    for seed in range(8):
        logits = random_logits(5, 2.0, seed).astype(dtype)
        whole, split, _ = both(logits, settings and {**settings, "seed": seed})
        assert split == whole


@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
def test_masks_and_penalties_are_those_of_all_logits(settings: dict[str, Any] | None) -> None:
    for seed in range(4):
        logits, ids = random_logits(1, 3.0, seed), [5, 5, 1200, 2999, int(mx.argmax(random_logits(1, 3.0, seed)))]
        processors = make_logits_processors({7: 12.0, 1500: -100.0, 2500: 4.0}, 1.4, 20, 0.5, 20, 0.7)
        mask = mx.array(np.random.default_rng(seed).random(V) < (0.002 if seed % 2 else 0.5))
        given = settings and {**settings, "seed": seed}
        for masked in (None, mask):
            for used in ((), processors):
                whole, split, _ = both(logits, given, masked, used, ids)
                assert split == whole


def test_a_draw_asks_for_more_only_where_it_must() -> None:
    sharp = random_logits(1, 5.0)
    for settings in (None, {"temp": 0.5}, {"temp": 1.0, "top_k": 40}, {"temp": 1.0, "top_p": 0.9}):
        assert len(both(sharp, settings and {**settings, "seed": 1})[2]) == 1
    assert both(sharp, None)[2] == [LEAST]
    flat = both(random_logits(1, 0.01), {"temp": 1.0, "seed": 1})[2]
    assert flat[-1] == V  # nothing less is exact where all tokens are equally likely


def test_a_mask_of_unlikely_tokens_asks_for_all_logits() -> None:
    logits = random_logits(1, 4.0)
    unlikely = mx.argsort(logits[0])[:3].tolist()
    whole, split, asked = both(logits, None, mx.array(np.isin(np.arange(V), unlikely)))
    assert split == whole and split[0] in unlikely
    assert asked == [LEAST, 16 * LEAST, V]


def test_a_mask_of_fewer_tokens_than_are_kept_asks_once() -> None:
    logits = random_logits(1, 4.0)
    likely = mx.array(np.isin(np.arange(V), mx.argsort(-logits[0])[:5].tolist()))
    whole, split, asked = both(logits, {"temp": 1.0, "top_k": 40, "seed": 1}, likely)
    assert split == whole and len(asked) == 1


def test_a_foreign_sampler_or_processor_gets_all_logits() -> None:
    model, logits = SplitHead(), random_logits(2, 2.0)
    split = model.candidates(logits)
    assert draw(split, lambda logprobs: mx.argmin(logprobs, axis=-1)).numbers() == mx.argmin(logits, axis=-1).tolist()
    opposite = apply_processors([lambda ids, given: -given], mx.array([1]), split[:1])
    assert draw(opposite, None).numbers() == [int(mx.argmin(logits[0]))]


def test_log_probabilities_of_the_likeliest_tokens_are_exact() -> None:
    logits = random_logits(2, 2.0)
    expected, found = draw(logits, None).logprobs, draw(SplitHead().candidates(logits), None).logprobs
    likeliest = mx.argsort(-expected, axis=-1)[:, :20]
    assert mx.argsort(-found, axis=-1)[:, :20].tolist() == likeliest.tolist()
    difference = mx.take_along_axis(expected - found, likeliest, axis=-1)
    assert float(mx.abs(difference).max()) < 1e-5


@pytest.mark.parametrize("at", [3, 2500])
def test_logits_that_are_not_finite_are_reported(at: int) -> None:
    logits = random_logits(1, 2.0)
    logits[0, at] = mx.nan
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        draw(SplitHead().candidates(logits), None).numbers()
    with pytest.raises(CheckpointError, match="NaN or infinity"):  # also where the draw does not look at it
        draw(
            apply_processors(make_logits_processors({7: 90.0}), mx.array([1]), SplitHead().candidates(logits)), None
        ).numbers()


def test_rows_are_chosen_and_joined() -> None:
    logits = random_logits(4, 3.0)
    split = SplitHead().candidates(logits)
    assert len(split[1:3]) == 2
    assert draw(split[mx.array([3, 0])], None).numbers() == mx.argmax(logits[mx.array([3, 0])], axis=-1).tolist()
    rows = SplitLogits.joined([split[2:3], split[1:2]])
    assert draw(rows, None).numbers() == mx.argmax(logits[mx.array([2, 1])], axis=-1).tolist()

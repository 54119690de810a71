"""Calibration text in batches: every token once, one RoPE table each, evenly spaced samples."""

from __future__ import annotations

import random
from itertools import chain, pairwise

import pytest

from phi4_mlx.convert.batches import BATCH_TOKENS, Batch, batches, spread

BOUNDARY = 64


def rows(count: int, longest: int) -> list[list[int]]:
    draw = random.Random(count)
    return [[draw.randrange(1, 100) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def tokens(batch: Batch) -> list[int]:
    found: list[int] = batch.ids.reshape(-1)[batch.wanted].tolist()
    return found


@pytest.mark.parametrize("boundary", [None, BOUNDARY])
@pytest.mark.parametrize("longest", [50, 200, 6000])
def test_every_token_is_in_one_batch(longest: int, boundary: int | None) -> None:
    given = rows(40, longest)
    found = batches(given, boundary)
    assert sorted(chain.from_iterable(map(tokens, found))) == sorted(chain.from_iterable(given))
    for batch in found:
        assert batch.ids.size <= BATCH_TOKENS or len(batch.ids) == 1
        lengths = (batch.ids > 0).sum(axis=1)
        assert boundary is None or len({length > boundary for length in lengths.tolist()}) == 1


def test_samples_are_spread_evenly() -> None:
    given = [[number] * 10 for number in range(100)]
    assert spread(given, 1000) == given
    found = [row[0] for row in spread(given, 200)]
    assert len(found) == 20 and all(4 <= later - sooner <= 6 for sooner, later in pairwise(found))
    assert spread([[1] * 50], 20) == [[1] * 20]

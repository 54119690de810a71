"""The places of the largest logits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.models.split_logits import likeliest


@pytest.mark.parametrize("V", [65, 128, 1000, 5000])
@pytest.mark.parametrize("count", [1, 2, 7, 40, 64])
@pytest.mark.parametrize("levels", [3, 50, 10**6])
def test_the_largest_of_each_row_are_found_and_of_equal_ones_the_first(V: int, count: int, levels: int) -> None:
    logits = mx.array(np.random.default_rng(0).integers(0, levels, (3, V)).astype(np.float32))
    if levels == 50:  # as under a mask that leaves few tokens, and in some rows fewer than `count`
        logits = mx.where(logits < 49, -mx.inf, logits)
    expected = mx.sort(mx.argsort(-logits, axis=-1)[:, :count], axis=-1)
    assert mx.array_equal(mx.sort(likeliest(logits, count), axis=-1), expected)

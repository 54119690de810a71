"""Rows of several samples: the hidden states equal those of each sample alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.models.text import Model
from tests.tiny_sambay import make_tiny_sambay

BOUNDARY = 64  # of the tiny models


def pack(lengths: list[int], padding: int, seed: int) -> tuple[list[mx.array], mx.array, mx.array]:
    """Samples, and one row with all of them: ids and segments [1, T]."""
    keys = mx.random.split(mx.random.key(seed), len(lengths))
    samples = [mx.random.randint(1, 512, (n,), key=key) for n, key in zip(lengths, keys, strict=True)]
    segments = [mx.full((n,), number, mx.int32) for number, n in enumerate(lengths, 1)]
    zeros = mx.zeros((padding,), mx.int32)
    return samples, mx.concatenate([*samples, zeros])[None], mx.concatenate([*segments, zeros])[None]


@pytest.mark.parametrize(
    ("lengths", "config"),
    [
        ([5, 9, 1, 20], {}),
        ([BOUNDARY, 3], {}),
        ([BOUNDARY + 1, 80], {}),
        ([30, BOUNDARY + 20, 12], {}),  # both tables in one row
        ([7, 8], {"partial_rotary_factor": 1.0}),
        ([7, 80], {"rope_scaling": None}),
    ],
)
def test_a_packed_row_is_its_samples_side_by_side(
    tiny_model: Callable[..., Model], lengths: list[int], config: dict[str, Any]
) -> None:
    model = tiny_model(**config)
    samples, ids, segments = pack(lengths, padding=4, seed=len(lengths))
    packed, at = model.hidden(ids, segments=segments), 0
    for sample in samples:
        alone = model.hidden(sample[None])
        found = packed[:, at : at + sample.size]
        assert mx.allclose(found, alone, rtol=0, atol=1e-4), f"the sample at {at}"
        at += sample.size


@pytest.mark.parametrize("config", [{}, {"sliding_window": 1}, {"mamba_d_conv": 1}, {"mamba_d_conv": 3}])
def test_the_states_of_a_hybrid_begin_anew_in_each_sample(config: dict[str, Any]) -> None:
    """Lengths of one token, of a chunk of the scan, and longer than the window."""
    model = make_tiny_sambay(**config)
    samples, ids, segments = pack([1, 16, 40, 1, 33], padding=4, seed=3)
    packed, at = model.hidden(ids, segments=segments), 0
    for sample in samples:
        assert mx.allclose(packed[:, at : at + sample.size], model.hidden(sample[None]), rtol=0, atol=1e-4), at
        at += sample.size


def test_rows_of_a_batch_are_packed_each_in_its_way(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    first, ids_a, segments_a = pack([70, 10], 0, 1)
    second, ids_b, segments_b = pack([20, 20, 40], 0, 2)
    packed = model.hidden(mx.concatenate([ids_a, ids_b]), segments=mx.concatenate([segments_a, segments_b]))
    assert mx.allclose(packed[0, 70:], model.hidden(first[1][None])[0], rtol=0, atol=1e-4)
    assert mx.allclose(packed[1, 20:40], model.hidden(second[1][None])[0], rtol=0, atol=1e-4)

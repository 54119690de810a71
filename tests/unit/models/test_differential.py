"""Differential attention in training: the gradients of the whole scores, in memory that is linear in the length."""

from __future__ import annotations

import mlx.core as mx
import pytest

from phi4_mlx.models.differential import TRAINED_ROWS, difference
from tests.model_runs import close, peak_memory


def inputs(T: int) -> list[mx.array]:
    """Queries, keys, values and lambda, and a weight for each output."""
    shapes = (1, 2, 2, 2, T, 8), (1, 2, 2, T, 8), (1, 2, T, 16), (), (1, 2, 2, T, 16)
    keys = mx.random.split(mx.random.key(T), len(shapes))
    return [mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True)]


def gradients(T: int, window: int | None, training: bool, mask: mx.array | None = None) -> list[mx.array]:
    *arrays, pull = inputs(T)

    def loss(*arrays: mx.array) -> mx.array:
        return (difference(*arrays, window, mask, training=training) * pull).sum()

    return list(mx.grad(loss, [0, 1, 2, 3])(*arrays))


@pytest.mark.parametrize("T", [1, TRAINED_ROWS, 2 * TRAINED_ROWS + 5])
@pytest.mark.parametrize("window", [None, 16, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_whole_scores(T: int, window: int | None, masked: bool) -> None:
    at = mx.arange(T)
    mask = ((at[:, None] // 50) == (at // 50))[None, None] if masked else None
    found, expected = (gradients(T, window, training, mask) for training in (True, False))
    for one, other in zip(found, expected, strict=True):
        assert close(one, other, 2e-5 if other.ndim else 1e-3)  # that of lambda is a sum over all scores


@pytest.mark.parametrize("window", [None, 300])
def test_memory_in_training_is_linear_in_the_length(window: int | None) -> None:
    before = mx.get_active_memory()
    one, two = (peak_memory(lambda T=T: gradients(T, window, True)) - before for T in (1024, 2048))  # type: ignore[misc]
    assert two < 2.3 * one

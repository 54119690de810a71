"""Rounding for the outputs of a layer: a small change survives, and no move makes the error larger."""

from __future__ import annotations

import mlx.core as mx
import pytest

from phi4_mlx.convert.quantize import Scheme
from phi4_mlx.lora.rounding import metric, rounded

ROWS, WIDTH, RANK = 48, 128, 2


def random(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def dequantized(arrays: list[mx.array], scheme: Scheme) -> mx.array:
    return mx.dequantize(*arrays, **vars(scheme)).astype(mx.float32)


def output_error(error: mx.array, inputs: mx.array) -> float:
    return mx.square(inputs @ error.T).sum().item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_change_smaller_than_half_a_step_survives(dtype: mx.Dtype) -> None:
    """Nearest rounding on the grid of the base returns the base; rounding for the outputs does not."""
    scheme = Scheme("affine", 4, 64)
    grid = list(mx.quantize(random(ROWS, WIDTH, seed=1).astype(dtype), **vars(scheme)))
    base = dequantized([grid[0], *(array.astype(mx.float32) for array in grid[1:])], scheme)
    a, b = random(WIDTH, RANK, seed=2), random(RANK, ROWS, seed=3)
    change = 0.005 * (a @ b).T
    assert mx.abs(change).mean() < 0.1 * mx.abs(grid[1].astype(mx.float32)).mean()  # of a step
    inputs = random(300, WIDTH, seed=4) + 3 * random(300, RANK, seed=5) @ a.T
    arrays = rounded(base + change, scheme, dtype, metric(inputs, a), grid)
    assert all(mx.array_equal(new, old) for new, old in zip(arrays[1:], grid[1:], strict=True))
    found = dequantized([arrays[0], *(array.astype(mx.float32) for array in arrays[1:])], scheme)
    unseen = random(300, WIDTH, seed=6) + 3 * random(300, RANK, seed=7) @ a.T
    for some in (inputs, unseen):
        assert output_error(found - base - change, some) < 0.15 * output_error(change, some)


def test_no_move_makes_the_error_larger() -> None:
    """Against nearest rounding, in the metric that is minimised, with and without the grid of the base."""
    scheme = Scheme("affine", 4, 32)
    exact, a = random(ROWS, WIDTH, seed=8), random(WIDTH, RANK, seed=9)
    grid = list(mx.quantize(0.8 * exact, **vars(scheme)))  # too narrow for some groups
    own = metric(random(40, WIDTH, seed=10), a)
    nearest = dequantized(list(mx.quantize(exact, **vars(scheme))), scheme) - exact
    for base in (None, grid):
        error = dequantized(rounded(exact, scheme, mx.float32, own, base), scheme) - exact
        assert ((error @ own) * error).sum() < 0.5 * ((nearest @ own) * nearest).sum()


def test_other_modes_round_to_nearest_and_constant_rows_stay() -> None:
    exact, own = random(ROWS, WIDTH, seed=11), mx.eye(WIDTH)
    scheme = Scheme("mxfp4", 4, 32)
    expected = mx.quantize(exact, **vars(scheme))
    arrays = rounded(exact, scheme, mx.float32, own, None)
    assert all(mx.array_equal(x, y) for x, y in zip(arrays, expected, strict=True))
    scheme, flat = Scheme("affine", 4, 32), mx.zeros((ROWS, WIDTH))
    grid = list(mx.quantize(flat, **vars(scheme)))
    assert mx.abs(dequantized(rounded(flat, scheme, mx.float32, own, grid), scheme)).max() < 1e-6

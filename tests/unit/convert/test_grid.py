"""The grid of a group: never worse than MLX's, exact in the file's dtype, and at ease with odd groups."""

from __future__ import annotations

import mlx.core as mx
import pytest

from phi4_mlx.convert.grid import Grid, search

SIZE, ROWS = 64, 40
DTYPES = [mx.float32, mx.bfloat16, mx.float16]


def random(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def loss(group: mx.array, importance: mx.array, grid: Grid, bits: int) -> mx.array:
    values = grid.values(grid.codes(group, mx.array(2.0**bits - 1)))
    return (importance[:, None] * mx.square(values - group)).sum(axis=0)


def plain(group: mx.array, bits: int, dtype: mx.Dtype) -> Grid:
    _, scales, biases = mx.quantize(group.T.astype(dtype), len(group), bits)
    return Grid(scales[:, 0].astype(mx.float32), biases[:, 0].astype(mx.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_weighted_error_is_smaller_than_that_of_mlx(bits: int, dtype: mx.Dtype) -> None:
    group, importance = random(SIZE, ROWS, seed=bits), mx.exp(2 * random(SIZE, seed=9))
    ours, theirs = (loss(group, importance, grid, bits) for grid in (
        search(group, importance, bits, dtype), plain(group, bits, dtype)
    ))  # fmt: skip
    assert (ours <= theirs * (1 + 1e-5)).all() and ours.sum() < (0.95 if bits == 8 else 0.85) * theirs.sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_and_biases_are_exact_in_the_file(dtype: mx.Dtype) -> None:
    for part in search(random(SIZE, ROWS, seed=1), mx.ones(SIZE), 4, dtype):
        assert mx.array_equal(part.astype(dtype).astype(mx.float32), part)


def test_odd_groups() -> None:
    """Zeros, a constant, one outlier, two values, the largest numbers of float16."""
    group = random(SIZE, 5, seed=2)
    group[:, 0], group[:, 1] = 0, 0.3
    group[7, 2] = 1e4
    group[:, 3] = mx.where(group[:, 3] > 0, 1.5, -0.25)
    group[:, 4] *= 1.5e4
    for dtype in DTYPES:
        grid = search(group, mx.ones(SIZE), 4, dtype)
        assert all(mx.isfinite(part).all() for part in grid)
        values = grid.values(grid.codes(group, mx.array(15.0)))
        assert mx.array_equal(values[:, 0], mx.zeros(SIZE))
        assert mx.abs(values[:, [1, 3]] - group[:, [1, 3]]).max() < 0.005
        assert mx.abs(values[7, 2] - 1e4) < 100
        assert loss(group, mx.ones(SIZE), grid, 4)[4] <= loss(group, mx.ones(SIZE), plain(group, 4, dtype), 4)[4]

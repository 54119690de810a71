"""GPTQ on MLX's grid: equal to the slow algorithm, better than rounding to nearest, and at ease with odd Hessians."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.convert.gptq import DAMPING, Solver
from phi4_mlx.convert.grid import Grid, search
from phi4_mlx.convert.packing import unpacked
from phi4_mlx.convert.quantize import Scheme
from phi4_mlx.errors import RequestError

ROWS, WIDTH, TOKENS = 24, 128, 400
SCHEME = Scheme("affine", 4, 32)


def random(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def hessian_of(tokens: int = TOKENS) -> mx.array:
    """Of inputs that depend on each other and differ in size."""
    inputs = random(tokens, WIDTH, seed=1) @ random(WIDTH, WIDTH, seed=2) * mx.exp(random(WIDTH, seed=3))
    return inputs.T @ inputs / tokens


def values(arrays: tuple[mx.array, ...], scheme: Scheme) -> mx.array:
    weight, scales, biases = arrays[:3]
    return mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), **vars(scheme))


def output_error(found: mx.array, weight: mx.array, hessian: mx.array) -> float:
    error: float = (((found - weight) @ hessian) * (found - weight)).sum().item()
    return error


def column_by_column(weight: mx.array, hessian: mx.array, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values by the definition: each column's error is spread over all that follow, in float64."""
    damping = DAMPING * mx.diag(hessian).mean().item()
    damped = np.array(hessian, np.float64) + damping * np.eye(len(hessian))
    rest, levels = np.array(weight, np.float64), 2**scheme.bits - 1
    codes, found = np.zeros(rest.shape, int), np.zeros(rest.shape)
    for column in range(len(hessian)):
        inverse = np.linalg.inv(damped[column:, column:])
        if column % scheme.group_size == 0:
            last = column + scheme.group_size
            group, importance = mx.array(rest[:, column:last].T, mx.float32), mx.diag(hessian)[column:last] + damping
            scales, biases = (np.array(part, np.float64) for part in search(group, importance, scheme.bits, mx.float32))
        codes[:, column] = np.clip(np.round((rest[:, column] - biases) / scales), 0, levels)
        found[:, column] = codes[:, column] * scales + biases
        error = (rest[:, column] - found[:, column]) / inverse[0, 0]
        rest[:, column:] -= error[:, None] * inverse[0]
    return codes, found


def test_it_is_the_algorithm_column_by_column() -> None:
    weight, hessian = random(ROWS, 64, seed=4), hessian_of()[:64, :64]
    arrays = Solver(hessian).quantize(weight, SCHEME, mx.float32)
    codes, found = column_by_column(weight, hessian, SCHEME)
    assert (np.array(unpacked(arrays.weight, 4)) == codes).mean() > 0.98  # a tie may fall the other way in float32
    errors = [output_error(each, weight, hessian) for each in (values(arrays, SCHEME), mx.array(found, mx.float32))]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_outputs_are_closer_than_with_rounding_to_nearest(bits: int, dtype: mx.Dtype) -> None:
    scheme, hessian = Scheme("affine", bits, 64), hessian_of()
    weight = random(ROWS, WIDTH, seed=5).astype(dtype)
    ours = Solver(hessian).quantize(weight, scheme, dtype)[:3]
    theirs = mx.quantize(weight, **vars(scheme))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    exact = weight.astype(mx.float32)
    errors = [output_error(values(each, scheme), exact, hessian) for each in (ours, theirs)]
    assert errors[0] < (0.5 if bits < 8 or dtype == mx.float32 else 0.7) * errors[1]


def test_the_reported_error_is_that_of_the_outputs() -> None:
    weight, hessian = random(ROWS, WIDTH, seed=6), hessian_of()
    damped = hessian + DAMPING * mx.diag(hessian).mean() * mx.eye(WIDTH)
    arrays = Solver(hessian).quantize(weight, SCHEME, mx.float32)
    assert arrays.error.item() == pytest.approx(output_error(values(arrays, SCHEME), weight, damped), rel=1e-3)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, solver = random(ROWS, WIDTH, seed=7), Solver(hessian_of())
    whole = values(solver.quantize(weight, SCHEME, mx.float32), SCHEME)
    part = values(solver.quantize(weight[5:9], SCHEME, mx.float32), SCHEME)
    assert (mx.abs(whole[5:9] - part) < 1e-5).mean() > 0.98


def test_odd_weights_and_inputs() -> None:
    """Rows of zeros, an outlier, a group of one value, dead inputs, and no input at all."""
    weight, hessian = random(ROWS, WIDTH, seed=8), hessian_of()
    weight[0], weight[1, 40], weight[2, :32] = 0, 1e4, 0.5
    alive = mx.arange(WIDTH) % 3 > 0
    dead = mx.where(alive & alive[:, None], hessian, 0)
    for inputs in (hessian, dead, mx.zeros((WIDTH, WIDTH)), hessian_of(tokens=3)):
        found = values(Solver(inputs).quantize(weight, SCHEME, mx.bfloat16)[:3], SCHEME)
        assert mx.isfinite(found).all() and mx.array_equal(found[0], mx.zeros(WIDTH))
        assert mx.abs(found - weight)[3:].max() < 1


def test_a_hessian_that_rounding_made_indefinite_is_damped_more() -> None:
    """As of inputs that are one constant in all channels: float32 sums can leave an eigenvalue below -DAMPING."""
    weight, hessian = random(ROWS, WIDTH, seed=9), mx.full((WIDTH, WIDTH), 1.05) - 0.05 * mx.eye(WIDTH)
    ours, theirs = Solver(hessian).quantize(weight, SCHEME, mx.float32)[:3], mx.quantize(weight, **vars(SCHEME))
    exact = mx.ones((WIDTH, WIDTH))
    errors = [output_error(values(each, SCHEME), weight, exact) for each in (ours, theirs)]
    assert errors[0] < 0.1 * errors[1]
    assert mx.abs(values(ours, SCHEME) - weight).max() < 1


@pytest.mark.parametrize("bad", [mx.nan, mx.inf])
def test_a_hessian_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    hessian = hessian_of()
    hessian[3, 5] = bad
    with pytest.raises(RequestError, match=r"^lm_head: the second moments .* NaN or infinity"):
        Solver(hessian, "lm_head")


def test_grids_are_those_of_the_changed_weights() -> None:
    """The second group's grid fits what the first group's errors made of its weights."""
    weight, hessian = random(ROWS, WIDTH, seed=10), hessian_of()
    arrays = Solver(hessian).quantize(weight, SCHEME, mx.float32)
    first = search(weight[:, :32].T, mx.diag(hessian)[:32] + DAMPING * mx.diag(hessian).mean(), 4, mx.float32)
    assert mx.array_equal(Grid(arrays.scales[:, 0], arrays.biases[:, 0]).scales, first.scales)
    second = search(weight[:, 32:64].T, mx.diag(hessian)[32:64], 4, mx.float32)
    assert not mx.array_equal(arrays.scales[:, 1], second.scales)

"""Rounding of a fused matrix to few bits, so that its outputs stay those of the exact matrix.

Nearest rounding of W + D returns W where D is smaller than half a step, and the fine-tune is gone. Here the numbers of
a row are rounded together: coordinate descent moves single numbers by one step while the squared error of the row's
outputs shrinks. The start is the grid of the base, so a small D moves few numbers.

Source: the objective of GPTQ (arXiv 2210.17323), equation 1; the descent is that of QuantEase (arXiv 2309.01885).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from phi4_mlx.convert.packing import packed, unpacked
from phi4_mlx.convert.quantize import Scheme

SWEEPS = 3  # passes over the groups of a row
STEPS = 8  # numbers of a group that may move in one pass
DAMPING = 0.01  # weight of inputs that no calibration token has, relative to the mean input
ADAPTER_WEIGHT = 0.3  # weight of the directions that `lora_a` reads, relative to the mean input


def metric(inputs: mx.array, lora_a: mx.array) -> mx.array:
    """The matrix H for which e H e^T is the squared error that an error e of a row makes in the outputs.

    Args:
        inputs: inputs of the layer, [N, in].
        lora_a: [in, R]; its directions count too, so that the adapter survives on inputs that are not among these.

    Returns:
        fp32 [in, in].
    """
    inputs, directions = inputs.astype(mx.float32), lora_a.astype(mx.float32)
    directions = directions / mx.maximum(mx.linalg.norm(directions, axis=0), 1e-30)
    found = inputs.T @ inputs / len(inputs)
    mean = mx.maximum(mx.diag(found).mean(), 1e-30)
    width, rank = directions.shape
    spread = DAMPING * mx.eye(width) + (ADAPTER_WEIGHT * width / rank) * (directions @ directions.T)
    return found + mean * spread


def rounded(
    exact: mx.array, scheme: Scheme, dtype: mx.Dtype, metric: mx.array, base: Sequence[mx.array] | None
) -> list[mx.array]:
    """Quantises rows of a matrix.

    Args:
        exact: the rows, fp32 [rows, in].
        scheme: the quantisation; a mode other than affine rounds to nearest.
        dtype: of scales and biases.
        metric: from `metric`, fp32 [in, in].
        base: weight, scales and biases of the base in the same scheme; None for a grid of the rows' own.

    Returns:
        Weight, scales and biases, or without biases, as `mx.quantize`.
    """
    arrays: list[mx.array] = list(mx.quantize(exact.astype(dtype), **vars(scheme)))
    if scheme.mode != "affine":
        return arrays
    rows, size, levels = len(exact), scheme.group_size, 2**scheme.bits - 1
    codes = unpacked(arrays[0], scheme.bits).astype(mx.float32).reshape(rows, -1, size)
    scales, biases = arrays[1:]
    if base is not None:
        place = (exact.reshape(rows, -1, size) - base[2][..., None]) / mx.where(base[1] == 0, 1, base[1])[..., None]
        fits = ((place > -1) & (place < levels + 1)).all(axis=-1) & (base[1] != 0)  # the base's grid reaches as far
        codes = mx.where(fits[..., None], mx.clip(mx.round(place), 0, levels), codes)
        scales, biases = mx.where(fits, base[1], scales), mx.where(fits, base[2], biases)
    steps = scales.astype(mx.float32)
    error = (codes * steps[..., None] + biases[..., None].astype(mx.float32)).reshape(rows, -1) - exact
    codes = _descend(codes, steps, error @ metric, metric, levels)
    return [packed(codes, scheme.bits), scales, biases]


def _descend(codes: mx.array, steps: mx.array, slope: mx.array, metric: mx.array, levels: int) -> mx.array:
    """Codes [rows, groups, size] -> codes [rows, in] with smaller errors; `slope` is error @ metric, [rows, in]."""
    size = codes.shape[2]
    groups = [codes[:, number] for number in range(codes.shape[1])]
    for _ in range(SWEEPS):
        for number, before in enumerate(groups):
            first, last = number * size, (number + 1) * size
            step = steps[:, number : number + 1]
            groups[number] = _moved(before, step, slope[:, first:last], metric[first:last, first:last], levels)
            slope = slope + (step * (groups[number] - before)) @ metric[first:last]
    return mx.concatenate(groups, axis=1)


@mx.compile
def _moved(codes: mx.array, step: mx.array, slope: mx.array, metric: mx.array, levels: int) -> mx.array:
    """The codes of a group [rows, size] after its best moves, each by one step; none makes the error larger."""
    columns, curvature = mx.arange(codes.shape[1]), mx.square(step) * mx.diag(metric)
    for _ in range(STEPS):
        up = mx.where(codes < levels, curvature + 2 * step * slope, mx.inf)
        down = mx.where(codes > 0, curvature - 2 * step * slope, mx.inf)
        change = mx.minimum(up, down)
        best = (columns == change.argmin(axis=1, keepdims=True)) & (change < 0)
        move = mx.where(best, mx.where(up <= down, 1.0, -1.0), 0.0)
        codes = codes + move
        slope = slope + (step * move) @ metric
    return codes

"""The grid of a group of weights, scale * code + bias, searched so that the weighted squared error is small.

The search starts from several ranges. Each rounds the weights to codes, and weighted least squares finds the scale and
the bias that fit those codes best. Scale and bias are rounded to their dtype in the file before the error is measured,
so that of two grids the one that is better as written wins.

Arrays are transposed: a group is [size, rows], so that the numbers of one input lie side by side.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import mlx.core as mx

STARTS = tuple((low / 16, high / 16) for low in (0, 1, 2) for high in (0, 1, 2))
"""Shares of the weights' range that are cut off below and above."""
FITS = 2  # least squares after each start


class Grid(NamedTuple):
    """Scale and bias of a group in each row, fp32 [rows], exact in their dtype in the file."""

    scales: mx.array
    biases: mx.array

    def codes(self, group: mx.array, levels: mx.array) -> mx.array:
        """The nearest codes from 0 to `levels`, fp32 [size, rows] or [rows], of weights of that shape."""
        found: mx.array = _codes(group, levels, *self)
        return found

    def values(self, codes: mx.array) -> mx.array:
        """The weights that codes stand for."""
        return codes * self.scales + self.biases

    def loss(self, group: mx.array, weights: mx.array, levels: mx.array) -> mx.array:
        """Weighted squared error of the nearest codes, [rows], of weights [size, rows]."""
        terms: mx.array = _terms(group, weights, levels, *self)
        return terms.sum(axis=0)


def search(group: mx.array, importance: mx.array, bits: int, dtype: mx.Dtype) -> Grid:
    """Searches the grids of a group of columns, for all rows at once.

    Args:
        group: the weights, fp32 [size, rows].
        importance: weight of each column's squared error, fp32 [size], positive.
        bits: of a code.
        dtype: of scales and biases in the file.

    Returns:
        The grids; none has a larger weighted error than that of `mx.quantize`.
    """
    _, scales, biases = mx.quantize(group.T.astype(dtype), len(importance), bits)
    best = Grid(scales[:, 0].astype(mx.float32), biases[:, 0].astype(mx.float32))
    levels, weights = mx.array(2.0**bits - 1), (importance / importance.sum())[:, None]
    least = best.loss(group, weights, levels)
    low, high = group.min(axis=0), group.max(axis=0)
    width, mean = high - low, (weights * group).sum(axis=0)
    weighted = weights * (group - mean)
    for below, above in STARTS:
        grid = Grid(_written(width * (1 - below - above) / levels, dtype), _written(low + below * width, dtype))
        for _ in range(FITS):
            codes = grid.codes(group, levels)
            middle = (weights * codes).sum(axis=0)
            spread, slope = (weights * mx.square(codes - middle)).sum(axis=0), (weighted * codes).sum(axis=0)
            scales = mx.where(spread > 0, slope / mx.where(spread > 0, spread, 1.0), grid.scales)
            scales = _written(scales, dtype)  # before the bias, which makes up for the rounding
            grid = Grid(scales, _written(mean - scales * middle, dtype))
            loss = grid.loss(group, weights, levels)
            better = loss < least
            least = mx.where(better, loss, least)
            best = Grid(*(mx.where(better, new, old) for new, old in zip(grid, best, strict=True)))
    return best


def _written(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """The numbers as the file will have them."""
    return array.astype(dtype).astype(mx.float32)


# Compiled, so that a GPU reads the group once; shapeless, so that all matrices share the kernels.
@partial(mx.compile, shapeless=True)
def _codes(group: mx.array, levels: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    return mx.clip(mx.round((group - biases) / mx.where(scales == 0, 1.0, scales)), 0, levels)


@partial(mx.compile, shapeless=True)
def _terms(group: mx.array, weights: mx.array, levels: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    codes = mx.clip(mx.round((group - biases) / mx.where(scales == 0, 1.0, scales)), 0, levels)
    return weights * mx.square(codes * scales + biases - group)

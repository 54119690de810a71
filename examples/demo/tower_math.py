"""The operations of the towers for training on a CPU, as additions, multiplications and matrix products.

MLX's convolutions and activations are slow there, forwards and backwards; these are several times as fast and equal to
1e-5. Only training uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cpu_math
import mlx.core as mx
import mlx.nn as nn

SLOPE, CUBE = 1.5957691216, 0.044715  # GELU's tanh form is x * sigmoid(SLOPE * (x + CUBE * x^3))


@mx.custom_function
def gelu(x: mx.array) -> mx.array:
    """GELU in its tanh form, which differs from the exact one by at most 5e-4."""
    return x * cpu_math.sigmoid(SLOPE * (x + CUBE * x * x * x))


@gelu.vjp
def _gelu_vjp(x: Any, cotangent: mx.array, _: mx.array) -> mx.array:
    s = cpu_math.sigmoid(SLOPE * (x + CUBE * x * x * x))
    return cotangent * (s + x * s * (1 - s) * SLOPE * (1 + 3 * CUBE * x * x))


def conv2d(x: mx.array, weight: mx.array, *, stride: int, padding: int, groups: int) -> mx.array:
    """A depthwise convolution, or one of a single input channel: [B, T, F, 1 or C] with weights [C, k, k, 1]."""
    k = weight.shape[1]
    x = mx.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    height, width = ((size - k) // stride + 1 for size in x.shape[1:3])
    cells = [
        x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        for i in range(k)
        for j in range(k)
    ]
    taps = weight.reshape(len(weight), -1)  # [C, k * k]
    if groups == 1:
        return mx.concatenate(cells, axis=-1) @ taps.T
    return sum(cell * taps[:, tap] for tap, cell in enumerate(cells))


def conv1d(x: mx.array, weight: mx.array, *, groups: int) -> mx.array:
    """A depthwise convolution, [B, T, C] with weights [C, k, 1]."""
    T = x.shape[1] - weight.shape[1] + 1
    return sum(x[:, tap : tap + T] * weight[:, tap, 0] for tap in range(weight.shape[1]))


def attention(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any = None) -> mx.array:
    """Attention, causal or with an additive or boolean mask."""
    if isinstance(mask, str):
        return cpu_math.attention(queries, keys, values, scale=scale, mask=mask)
    scores = (queries * scale) @ keys.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, -1e4) if mask.dtype == mx.bool_ else scores + mask
    return cpu_math.softmax(scores) @ values


@contextmanager
def fast_tower_math() -> Iterator[None]:
    """Replaces functions of MLX with the versions of this file and of `cpu_math`."""
    versions: list[tuple[Any, str, Any]] = [
        (mx, "conv2d", conv2d),
        (mx, "conv1d", conv1d),
        (nn, "gelu_approx", gelu),
        (nn, "gelu", gelu),
        (mx.fast, "scaled_dot_product_attention", attention),
    ]
    with cpu_math.fast_cpu_math(), cpu_math.replaced(versions):
        yield

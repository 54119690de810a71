"""Attention of new tokens over a whole cache, without materialising all scores [heads, T, S].

Metal's kernel never does. Quantised keys and values are processed in blocks of keys with a running softmax; on a CPU,
causal attention runs in slices of queries; a row of packed samples is processed a few samples at a time.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx

from phi4_mlx.models.cache import Mask, Quantized
from phi4_mlx.models.fused import softmax_attention
from phi4_mlx.models.safe import safe

SLICE = 2**20  # scores a head in one slice of queries
BLOCK = 256  # keys; with 24 heads and a chunk of 2,048 tokens, 50 MB of scores
SCORES = 2**15  # scores a head in one block when there are few new tokens
CHUNK = 512  # tokens of packed samples that are processed together
QUEUED = 2**19  # scores queued before a wait: MLX allocates when it queues


class PackedAttention:
    """Causal attention within each sample of packed rows.

    Args:
        segments: [B, T], the number of each token's sample; the tokens of a sample are adjacent.

    Attributes:
        masks: of each part that `split` makes, bool [B, 1, t, t].
    """

    def __init__(self, segments: mx.array):
        import numpy as np

        T = segments.shape[1]
        lengths = [T]
        if len(segments) == 1 and not safe("slices"):
            begins = [0, *np.flatnonzero(np.diff(np.array(segments[0]))) + 1, T]
            lengths = chunks(np.diff(begins).tolist())
        self._ends = list(accumulate(lengths[:-1]))
        self.masks = [_block_diagonal(part) for part in mx.split(segments, self._ends, axis=1)]

    def __call__(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Attention output [B, H, T, Dh], of queries [B, H, T, Dh] over keys and values [B, K, T, Dh]."""
        split = (self.split(each, 2) for each in (queries, keys, values))
        parts = [softmax_attention(q, k, v, scale, mask) for q, k, v, mask in zip(*split, self.masks, strict=True)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)

    def split(self, array: mx.array, axis: int) -> list[mx.array]:
        """Whole samples that are processed together, along the axis of the tokens."""
        return list(mx.split(array, self._ends, axis=axis))


def chunks(lengths: Sequence[int]) -> list[int]:
    """The lengths of the stretches of a packed row that are processed one after the other.

    Args:
        lengths: tokens of each sample, from left to right.

    Returns:
        Sums of neighbours, each at most `CHUNK` or the longest sample.
    """
    most, found = max(CHUNK, *lengths), [0]
    for length in lengths:
        if found[-1] + length > most:
            found.append(0)
        found[-1] += length
    return found


def _block_diagonal(segments: mx.array) -> mx.array:
    """The keys [S] that each token [T] of packed rows may attend to: bool [B, 1, T, S]."""
    at = mx.arange(segments.shape[1])
    return ((segments[:, :, None] == segments[:, None, :]) & (at[:, None] >= at))[:, None]


def attention(queries: mx.array, keys: Any, values: Any, scale: float, mask: Mask, bits: int | None) -> mx.array:
    """Attention output for each query.

    Args:
        queries: [B, H, T, Dh].
        keys: [B, K, S, Dh], or `Quantized`; the last T belong to the queries.
        values: like the keys.
        scale: of the scores, before the softmax.
        mask: None where every query sees every key, "causal", or bool [B or 1, 1, T, S].
        bits: of quantised keys and values; else None.

    Returns:
        [B, H, T, Dh], in the dtype of the queries.
    """
    if bits is not None:
        return (dequantised if safe("blocks") else in_blocks)(queries, keys, values, scale, mask, bits)
    if isinstance(mask, str) and not safe("slices") and mx.default_device() == mx.Device(mx.cpu):
        return in_slices(queries, keys, values, scale, max(1, SLICE // keys.shape[2]))
    return softmax_attention(queries, keys, values, scale, mask)


def in_slices(queries: mx.array, keys: mx.array, values: mx.array, scale: float, rows: int) -> mx.array:
    """Causal attention, `rows` queries at a time, each slice over the keys it may attend to."""
    T, S = queries.shape[2], keys.shape[2]
    slices, queued = [], 0
    for start in range(0, T, rows):
        stop = min(T, start + rows)
        seen = S - T + stop
        slices.append(
            softmax_attention(queries[:, :, start:stop], keys[:, :, :seen], values[:, :, :seen], scale, "causal")
        )
        queued += seen * (stop - start)
        if queued > QUEUED:
            mx.eval(slices)
            queued = 0
    return slices[0] if len(slices) == 1 else mx.concatenate(slices, axis=2)


def in_blocks(
    queries: mx.array, keys: Quantized, values: Quantized, scale: float, mask: Mask, bits: int, block: int | None = None
) -> mx.array:
    """Attention over quantised keys and values, `block` positions at a time, in float32."""
    B, H, T, Dh = queries.shape
    K, S = keys[0].shape[1], keys[0].shape[2]
    block = block or max(BLOCK, SCORES // T)
    product = partial(mx.quantized_matmul, group_size=Dh // keys[1].shape[3], bits=bits)
    rows = (queries.astype(mx.float32) * scale).reshape(B, K, -1, Dh)  # queries of one key head together
    top = total = out = mx.array(0.0)
    queued = 0
    for start in range(0, S, block):
        stop = min(S, start + block)
        scores = product(rows, *(array[:, :, start:stop] for array in keys), transpose=True)  # [B, K, G * T, block]
        allowed = _allowed(mask, T, S, start, stop)
        if allowed is not None:
            least = mx.finfo(mx.float32).min  # not -inf: a row may see nothing of a block
            scores = mx.where(allowed, scores.reshape(B, K, H // K, T, -1), least).reshape(scores.shape)
        highest = scores.max(axis=-1, keepdims=True)
        highest = mx.maximum(top, highest) if start else highest
        weights = mx.exp(scores - highest)
        mass = weights.sum(axis=-1, keepdims=True)
        seen = product(weights, *(array[:, :, start:stop] for array in values), transpose=False)  # [B, K, G * T, Dh]
        if start:
            fade = mx.exp(top - highest)
            mass, seen = mass + total * fade, seen + out * fade
        top, total, out = highest, mass, seen
        queued += scores.size
        if queued > QUEUED and T > 1:  # a decode step never waits
            mx.eval(top, total, out)
            queued = 0
    return (out / total).astype(queries.dtype).reshape(B, H, T, Dh)


def dequantised(
    queries: mx.array, keys: Quantized, values: Quantized, scale: float, mask: Mask, bits: int
) -> mx.array:
    """`in_blocks` with keys and values dequantised whole."""
    size = queries.shape[3] // keys[1].shape[3]
    k, v = (mx.dequantize(*each, group_size=size, bits=bits).astype(mx.float32) for each in (keys, values))
    return softmax_attention(queries.astype(mx.float32), k, v, scale, mask).astype(queries.dtype)


def _allowed(mask: Mask, T: int, S: int, start: int, stop: int) -> mx.array | None:
    """The keys of a block that each query may attend to, broadcastable to [B, K, G, T, block]; None for all."""
    if mask is None or (isinstance(mask, str) and stop <= S - T + 1):
        return None
    if isinstance(mask, str):
        return mx.arange(S - T, S)[:, None] >= mx.arange(start, stop)
    return mask[:, :, None, :, start:stop]

"""Attention of new tokens over all that a cache holds, without an array of all scores, [heads, T, S].

Metal's kernel does without one. Over quantised keys and values it goes a block of keys at a time, with a running
softmax; on a CPU, a slice of queries at a time.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx

SLICE = 2**20  # scores of a head in a slice of queries
BLOCK = 256  # keys; with 24 heads and a chunk of 2,048 tokens, 50 MB of scores
SCORES = 2**15  # scores of a head that a block may have where there are few new tokens
QUEUED = 2**19  # scores that may be on their way: what is queued has its memory already

Packed = tuple[mx.array, mx.array, mx.array]  # what `mx.quantize` makes of [B, K, S, Dh]


def attention(queries: mx.array, keys: Any, values: Any, scale: float, mask: Any, bits: int | None) -> mx.array:
    """What each query saw.

    Args:
        queries: [B, H, T, Dh].
        keys: [B, K, S, Dh], or `Packed`; the last T are the queries' own.
        values: like the keys.
        scale: of the scores, before the softmax.
        mask: None where every query sees all keys, "causal", or bool [B or 1, 1, T, S].
        bits: of keys and values, if they are quantised.

    Returns:
        [B, H, T, Dh], in the dtype of the queries.
    """
    if bits is not None:
        return in_blocks(queries, keys, values, scale, mask, bits)
    if isinstance(mask, str) and mx.default_device() == mx.Device(mx.cpu):
        return in_slices(queries, keys, values, scale, max(1, SLICE // keys.shape[2]))
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def in_slices(queries: mx.array, keys: mx.array, values: mx.array, scale: float, rows: int) -> mx.array:
    """Causal attention, `rows` queries at a time, each slice over the keys that it may see."""
    T, S = queries.shape[2], keys.shape[2]
    slices, queued = [], 0
    for start in range(0, T, rows):
        stop = min(T, start + rows)
        seen = S - T + stop
        slices.append(
            mx.fast.scaled_dot_product_attention(
                queries[:, :, start:stop], keys[:, :, :seen], values[:, :, :seen], scale=scale, mask="causal"
            )
        )
        queued += seen * (stop - start)
        if queued > QUEUED:
            mx.eval(slices)
            queued = 0
    return slices[0] if len(slices) == 1 else mx.concatenate(slices, axis=2)


def in_blocks(
    queries: mx.array, keys: Packed, values: Packed, scale: float, mask: Any, bits: int, block: int | None = None
) -> mx.array:
    """Attention over quantised keys and values, `block` of them at a time; all in float32."""
    B, H, T, Dh = queries.shape
    K, S = keys[0].shape[1], keys[0].shape[2]
    block = block or max(BLOCK, SCORES // T)
    product = partial(mx.quantized_matmul, group_size=Dh // keys[1].shape[3], bits=bits)
    rows = (queries.astype(mx.float32) * scale).reshape(B, K, -1, Dh)  # the queries of one key head side by side
    top = total = out = mx.array(0.0)
    queued = 0
    for start in range(0, S, block):
        stop = min(S, start + block)
        scores = product(rows, *(array[:, :, start:stop] for array in keys), transpose=True)  # [B, K, G * T, block]
        allowed = _allowed(mask, T, S, start, stop)
        if allowed is not None:
            least = mx.finfo(mx.float32).min  # not minus infinity: a row may see nothing of a block
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


def _allowed(mask: Any, T: int, S: int, start: int, stop: int) -> mx.array | None:
    """Which keys of a block the queries may look at, broadcast to [B, K, G, T, block]; None for all."""
    if mask is None or (isinstance(mask, str) and stop <= S - T + 1):
        return None
    if isinstance(mask, str):
        return mx.arange(S - T, S)[:, None] >= mx.arange(start, stop)
    return mask[:, :, None, :, start:stop]

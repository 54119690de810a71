"""Attention of new tokens over all that a cache holds: whole, or in blocks of keys with a running softmax.

In blocks nothing of the shape [heads, T, S] ever stands in memory, and keys and values may stay quantised.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

BLOCK = 256  # keys; with 24 heads and a chunk of 2,048 tokens, 50 MB of scores
SCORES = 2**15  # scores of a head that a block may have where there are few new tokens
QUEUED = 2**19  # scores that may be on their way: what is queued has its memory already
WHOLE = 2**22  # scores of a head that may stand in memory where the device has no kernel that does without them


def attention(queries: mx.array, keys: Any, values: Any, scale: float, mask: Any, bits: int | None) -> mx.array:
    """What each query saw.

    Args:
        queries: [B, H, T, Dh].
        keys: [B, K, S, Dh], or what `mx.quantize` makes of that; the last T are the queries' own.
        values: like the keys.
        scale: of the scores, before the softmax.
        mask: None where every query sees all keys, "causal", or bool [B or 1, 1, T, S].
        bits: of keys and values, if they are quantised.

    Returns:
        [B, H, T, Dh], in the dtype of the queries.
    """
    if bits is None:
        T, S = queries.shape[2], keys.shape[2]
        if T * S <= WHOLE or mx.default_device() != mx.Device(mx.cpu):
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
        return in_blocks(queries, (keys,), (values,), scale, mask, lambda x, y: x @ y.swapaxes(-1, -2), mx.matmul)
    product = partial(mx.quantized_matmul, group_size=queries.shape[3] // keys[1].shape[3], bits=bits)
    score, mix = partial(product, transpose=True), partial(product, transpose=False)
    return in_blocks(queries, keys, values, scale, mask, score, mix)


def in_blocks(
    queries: mx.array,
    keys: tuple[mx.array, ...],
    values: tuple[mx.array, ...],
    scale: float,
    mask: Any,
    score: Callable[..., mx.array],
    mix: Callable[..., mx.array],
    block: int | None = None,
) -> mx.array:
    """As `attention`, a block of keys at a time, softmax in float32.

    Args:
        queries: [B, H, T, Dh].
        keys: arrays [B, K, S, ..] that hold them together.
        values: like the keys.
        scale: as above.
        mask: as above.
        score: (queries [B, K, G * T, Dh], the arrays of a block of keys) -> scores [B, K, G * T, block].
        mix: (weights [B, K, G * T, block], the arrays of a block of values) -> [B, K, G * T, Dh].
        block: how many keys.
    """
    B, H, T, Dh = queries.shape
    K, S = keys[0].shape[1], keys[0].shape[2]
    block = block or max(BLOCK, SCORES // T)
    rows = (queries.astype(mx.float32) * scale).reshape(B, K, -1, Dh)  # the queries of one key head side by side
    top = total = out = mx.array(0.0)
    queued = 0
    for start in range(0, S, block):
        stop = min(S, start + block)
        scores = score(rows, *(array[..., start:stop, :] for array in keys))
        allowed = _allowed(mask, T, S, start, stop)
        if allowed is not None:
            least = mx.finfo(mx.float32).min  # not minus infinity: a row may see nothing of a block
            scores = mx.where(allowed, scores.reshape(B, K, H // K, T, -1), least).reshape(scores.shape)
        highest = scores.max(axis=-1, keepdims=True)
        highest = mx.maximum(top, highest) if start else highest
        weights = mx.exp(scores - highest)
        mass = weights.sum(axis=-1, keepdims=True)
        seen = mix(weights, *(array[..., start:stop, :] for array in values))
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

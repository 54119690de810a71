"""MLX's fused kernels, each beside the same computation written out, which `PHI4_MLX_SAFE` takes in its place.

Shapes: B batch, T new tokens, S cached plus new, H query heads, K key/value heads, Dh head dim.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.models.safe import safe


def softmax_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: str | mx.array | None
) -> mx.array:
    """softmax(scale * queries keys^T) values.

    Args:
        queries: [B, H, T, Dh].
        keys: [B, K, S, Dh]; the last T belong to the queries.
        values: like the keys.
        scale: of the scores, before the softmax.
        mask: None, "causal", or bool or additive, broadcastable to [B, H, T, S].

    Returns:
        [B, H, T, Dh], in the dtype of the queries.
    """
    if not safe("attention"):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    B, H, T, Dh = queries.shape
    K, S = keys.shape[1], keys.shape[2]
    rows = (queries.astype(mx.float32) * scale).reshape(B, K, H // K, T, Dh)
    scores = rows @ keys[:, :, None].astype(mx.float32).swapaxes(-1, -2)
    seen = mx.arange(S - T, S)[:, None] >= mx.arange(S) if isinstance(mask, str) else mask
    if seen is not None:
        seen = mx.broadcast_to(seen, (B, H, T, S)).reshape(scores.shape)
        least = mx.finfo(mx.float32).min
        scores = mx.where(seen, scores, least) if seen.dtype == mx.bool_ else scores + seen
    attended = mx.softmax(scores, axis=-1) @ values[:, :, None].astype(mx.float32)
    return attended.reshape(B, H, T, -1).astype(queries.dtype)


def rope(heads: mx.array, dims: int, offset: int | mx.array, periods: mx.array) -> mx.array:
    """Rotates the first `dims` of each head, the first half of them against the second.

    Args:
        heads: [B, N, T, Dh].
        dims: that rotate.
        offset: the position of the first token; [B] where the rows differ.
        periods: [dims / 2], position / period is the angle in radians.
    """
    if not safe("rope"):
        return mx.fast.rope(heads, dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=periods)
    positions = mx.array(offset).reshape(-1, 1) + mx.arange(heads.shape[2])  # [B or 1, T]
    angles = (positions[..., None] / periods)[:, None]  # [B or 1, 1, T, dims / 2]
    first, second, rest = mx.split(heads, [dims // 2, dims], axis=-1)
    cos, sin = mx.cos(angles), mx.sin(angles)
    rotated = [first * cos - second * sin, first * sin + second * cos]
    return mx.concatenate([*(each.astype(heads.dtype) for each in rotated), rest], axis=-1)


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """Layer normalisation over the last axis; see `mlx.nn.LayerNorm`."""
    if not safe("norms"):
        return mx.fast.layer_norm(x, weight, bias, eps)
    exact = x.astype(mx.float32)
    centred = exact - exact.mean(axis=-1, keepdims=True)
    normed = (centred * mx.rsqrt(centred.square().mean(axis=-1, keepdims=True) + eps)).astype(x.dtype)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


class RMSNorm(nn.RMSNorm):
    """`mlx.nn.RMSNorm` with its twin."""

    traceable = True

    def __call__(self, x: mx.array) -> mx.array:
        if not safe("norms"):
            return mx.fast.rms_norm(x, self.weight, self.eps)
        exact = x.astype(mx.float32)
        return (exact * mx.rsqrt(exact.square().mean(axis=-1, keepdims=True) + self.eps)).astype(x.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """`mlx.nn.LayerNorm` with its twin."""

    traceable = True

    def __call__(self, x: mx.array) -> mx.array:
        return layer_norm(x, self.weight, self.bias, self.eps)

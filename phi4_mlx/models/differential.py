"""Differential attention: the difference of two softmaxes over one set of values, in slices of queries.

Heads come in pairs, even and odd; the keys and values of a pair are stored side by side, so that both softmaxes read
the values once.

Shapes: B batch, T new tokens, S cached plus new, D hidden, H query heads, K key/value heads, Dh head dim, P = K / 2
pairs of them, G = H / K queries a key.

Source: Differential Transformer (arXiv 2410.05258), with the pairing of `modeling_phi4flash.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.config.sambay import SambaYConfig
from phi4_mlx.models.attention import PackedAttention
from phi4_mlx.models.fused import RMSNorm
from phi4_mlx.models.safe import safe

SCORES = 2**22  # scores of all heads in one slice of queries
TRAINED_ROWS = 32  # queries in a slice in training, whose scores are computed again in backward

Mask: TypeAlias = "mx.array | PackedAttention | None"
"""The keys that a query may see, bool [B, 1, 1 or T, S]; or the samples packed in the rows; None for all keys."""

Slices = list[tuple[int, int]]
"""(start, stop) of each slice of queries."""

Seen = Callable[[int, int], tuple[slice, mx.array | None]]
"""(start, stop) of a slice -> the range of keys that it sees, and the mask of each query in it; None for no mask."""


def difference(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    weight: mx.array,
    window: int | None,
    mask: mx.array | None = None,
    *,
    training: bool = False,
) -> mx.array:
    """Causal differential attention, (softmax(q1 k1) - weight softmax(q2 k2)) v, in slices of queries.

    Args:
        queries: [B, 2, P, G, T, Dh], scaled; the last T positions.
        keys: [B, 2, P, S, Dh].
        values: [B, P, S, 2 Dh].
        weight: lambda, a scalar.
        window: a query sees itself and the window - 1 keys before it; None: all keys before it.
        mask: False where a query must not see a key, in addition to the above; bool [B, 1, 1 or T, S].
        training: True to compute scores again in backward, so that its memory is linear in T.

    Returns:
        [B, P, G, T, 2 Dh], in the dtype of the values.
    """
    B, _, P, G, T, _ = queries.shape
    S = keys.shape[3]
    # A slice of at most `window` queries sees less than two windows of keys.
    at_once = max(1, SCORES // (2 * B * P * G * min(S, 2 * (window or S))))
    step = T if safe("slices") else min(at_once, window or T, TRAINED_ROWS if training else T)

    def seen(start: int, stop: int) -> tuple[slice, mx.array | None]:
        end = S - T + stop
        begin = max(0, end - (stop - start) + 1 - window) if window else 0
        return slice(begin, end), _allowed(window, mask, start, stop, begin, end)

    slices = [(start, min(T, start + step)) for start in range(0, T, step)]
    if training and not safe("slices"):
        return _trained(slices, seen)(queries, keys, values, weight)
    return _in_slices(slices, seen, queries, keys, values, weight)


def _in_slices(
    slices: Slices, seen: Seen, queries: mx.array, keys: mx.array, values: mx.array, weight: mx.array
) -> mx.array:
    parts = []
    for start, stop in slices:
        columns, allowed = seen(start, stop)
        some = queries[:, :, :, :, start:stop], keys[:, :, :, columns], values[:, :, columns]
        parts.append(_attend(*some, weight, allowed))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=3)


def _trained(slices: Slices, seen: Seen) -> Callable[..., mx.array]:
    """`_in_slices`, with a gradient that computes the scores again, one slice after the other."""

    def backward(primals: list[mx.array], cotangent: mx.array, output: mx.array) -> list[mx.array]:
        queries, keys, values, weight = primals
        dqueries: list[mx.array] = []
        sums = [mx.zeros(each.shape, mx.float32) for each in (keys, values, weight)]
        for start, stop in slices:
            columns, allowed = seen(start, stop)
            some = [queries[:, :, :, :, start:stop], keys[:, :, :, columns], values[:, :, columns], weight]
            some = mx.depends(some, [*dqueries[-1:], *sums])  # frees the scores of one slice before the next
            attend = partial(_attend, allowed=allowed)
            _, (dq, dk, dv, dw) = mx.vjp(attend, some, [cotangent[:, :, :, start:stop]])
            dqueries.append(dq)
            sums = [sums[0].at[:, :, :, columns].add(dk), sums[1].at[:, :, columns].add(dv), sums[2] + dw]
        rest = [total.astype(each.dtype) for total, each in zip(sums, primals[1:], strict=True)]
        return [mx.concatenate(dqueries, axis=4), *rest]

    attended: Callable[..., mx.array] = mx.custom_function(partial(_in_slices, slices, seen))
    attended.vjp(backward)  # type: ignore[attr-defined]
    return attended


def _attend(
    queries: mx.array, keys: mx.array, values: mx.array, weight: mx.array, allowed: mx.array | None
) -> mx.array:
    """One slice of queries over the keys that some of them see."""
    B, _, P, G, rows, _ = queries.shape
    scores = queries.reshape(B, 2, P, G * rows, -1) @ keys.swapaxes(-1, -2)
    if allowed is not None:
        scores = mx.where(allowed, scores.reshape(B, 2, P, G, rows, -1), -mx.inf).reshape(scores.shape)
    probs = mx.softmax(scores, axis=-1, precise=True)  # [B, 2, P, G * rows, keys]
    mixed = (probs[:, 0] - weight * probs[:, 1]).astype(values.dtype) @ values
    return mixed.reshape(B, P, G, rows, -1)


def _allowed(
    window: int | None, mask: mx.array | None, start: int, stop: int, begin: int, end: int
) -> mx.array | None:
    """The mask of the queries start..stop over the keys begin..end, broadcastable to [B, 2, P, G, rows, keys]."""
    rows = stop - start
    allowed = None
    if rows > 1:
        at, key = mx.arange(end - rows, end)[:, None], mx.arange(begin, end)
        allowed = key <= at if window is None else (key <= at) & (key > at - window)
    if mask is not None:
        mask = mask[:, :, start:stop] if mask.shape[2] > 1 else mask
        mask = mask[:, :, None, None, :, begin:end]
        allowed = mask if allowed is None else allowed & mask
    return allowed


class InnerAttention(nn.Module):
    """The parameters of lambda, and the norm of the heads' outputs."""

    traceable = True

    def __init__(self, head_dim: int, layer: int):
        super().__init__()
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = mx.random.normal((4, head_dim), scale=0.1)
        self.subln = RMSNorm(2 * head_dim, eps=1e-5)
        self._initial = mx.array(0.8 - 0.6 * math.exp(-0.3 * layer))  # an array, so that layers share a trace

    @property
    def weight(self) -> mx.array:
        """Lambda, a float32 scalar."""
        q1, k1, q2, k2 = (
            each.astype(mx.float32) for each in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        )
        return mx.exp((q1 * k1).sum()) - mx.exp((q2 * k2).sum()) + self._initial

    def normed(self, x: mx.array) -> mx.array:
        """The norm of the heads' outputs [.., 2 Dh]."""
        return (self.subln(x) * (1 - self._initial)).astype(x.dtype)


class Attention(nn.Module):
    """Differential attention: heads in pairs, an even head less an odd one."""

    traceable = True

    def __init__(self, config: SambaYConfig, layer: int, window: int | None, *, cross: bool):
        super().__init__()
        self.H, self.K, self.Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.window, self.cross = window, cross
        width = self.H * self.Dh
        self.Wqkv = nn.Linear(config.hidden_size, width + (0 if cross else 2 * self.K * self.Dh))
        self.out_proj = nn.Linear(width, config.hidden_size)
        self.inner_cross_attn = InnerAttention(self.Dh, layer)

    def heads(self, x: mx.array) -> tuple[mx.array, ...]:
        """Projections of x [B, T, D].

        Returns:
            Lambda; queries [B, T, H * Dh]; and unless `cross`, keys [B, K, T, Dh], even heads first, and values
            [B, K / 2, T, 2 Dh].
        """
        width, kv = self.H * self.Dh, self.K * self.Dh
        weight, projected = self.inner_cross_attn.weight, self.Wqkv(x)
        if self.cross:
            return weight, projected
        queries, keys, values = mx.split(projected, [width, width + kv], axis=-1)
        B, T, _ = x.shape
        keys = keys.reshape(B, T, self.K // 2, 2, self.Dh).transpose(0, 3, 2, 1, 4).reshape(B, self.K, T, self.Dh)
        return weight, queries, keys, values.reshape(B, T, self.K // 2, 2 * self.Dh).swapaxes(1, 2)

    def attend(
        self,
        weight: mx.array,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: Mask,
    ) -> mx.array:
        """Queries [B, T, H * Dh], keys [B, K, S, Dh] and values [B, K / 2, S, 2 Dh] -> [B, P, G, T, 2 Dh]."""
        B, T, _ = queries.shape
        P, G = self.K // 2, self.H // self.K
        queries = queries.reshape(B, T, P, G, 2, self.Dh).transpose(0, 4, 2, 3, 1, 5) * self.Dh**-0.5
        keys = keys.reshape(B, 2, P, -1, self.Dh)
        if isinstance(mask, PackedAttention):
            parts = zip(mask.split(queries, 4), mask.split(keys, 3), mask.split(values, 2), mask.masks, strict=True)
            attended = [
                difference(q, k, v, weight, self.window, own, training=self.training) for q, k, v, own in parts
            ]
            return mx.concatenate(attended, axis=3)
        if mask is not None:
            mask = mask[..., -keys.shape[3] :]
        return difference(queries, keys, values, weight, self.window, mask, training=self.training)

    def output(self, mixed: mx.array) -> mx.array:
        """The output projection, [B, P, G, T, 2 Dh] -> [B, T, D]."""
        B, _, _, T, _ = mixed.shape
        return self.out_proj(self.inner_cross_attn.normed(mixed).transpose(0, 3, 1, 2, 4).reshape(B, T, -1))

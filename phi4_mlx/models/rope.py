"""Rotary positions: one frequency table for plain RoPE, two for LongRoPE, and which one a length asks for.

A sequence is rotated under one table from its first token to its last. While it is at most
`original_max_position_embeddings` long that is the short table; beyond, the long one. Keys cached under the other table
are of no use, and neither are the hidden states behind them: a crossing means to run the whole sequence again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from phi4_mlx.config import ModelConfig

Regime = Literal["short", "long"]


@dataclass(frozen=True)
class Rotation:
    """The rotation of one forward pass: the same for all its layers."""

    dims: int
    periods: mx.array  # [dims / 2], position / period is the angle in radians
    offset: int  # position of the first token
    query_scale: mx.array | None  # [Dh]

    def __call__(self, heads: mx.array, num_queries: int) -> tuple[mx.array, mx.array]:
        """Rotates `heads` [B, H + K, T, Dh], queries before keys, and parts them: [B, H, T, Dh], [B, K, T, Dh]."""
        heads = mx.fast.rope(
            heads, self.dims, traditional=False, base=None, scale=1.0, offset=self.offset, freqs=self.periods
        )
        queries, keys = mx.split(heads, [num_queries], axis=1)
        return (queries if self.query_scale is None else queries * self.query_scale), keys


class Rope:
    """The frequency tables of a model.

    Cos and sin carry a scale `a` under LongRoPE, the same for both tables. Attention uses only the product of a query
    and a key, so `a * a` goes once into the softmax scale, or, where a part of the head does not rotate, into the
    queries.

    Source: `Phi3RotaryEmbedding` and `_compute_longrope_parameters` in transformers.
    """

    def __init__(self, config: ModelConfig):
        self._dims = config.rotary_dims
        self._boundary = config.original_max_position_embeddings if config.rope_scaling else math.inf
        exponents = mx.arange(0, self._dims, 2, dtype=mx.float32) / self._dims
        # Powers in double precision, rounded once: a last-bit error is 0.01 rad at position 100,000.
        periods = mx.array([config.rope_theta**e for e in exponents.tolist()], mx.float32)
        self._periods: dict[Regime, mx.array] = {"short": periods, "long": periods}
        scale = 1.0
        if config.rope_scaling:
            self._periods = {
                "short": periods * mx.array(config.rope_scaling.short_factor, mx.float32),
                "long": periods * mx.array(config.rope_scaling.long_factor, mx.float32),
            }
            scale = config.rope_scaling.attention_factor**2
        partial = self._dims < config.head_dim
        self._query_scale: mx.array | None = None
        if partial and scale != 1:
            self._query_scale = mx.array([scale] * self._dims + [1.0] * (config.head_dim - self._dims), mx.float32)
        self.softmax_scale = (1.0 if partial else scale) / math.sqrt(config.head_dim)

    def regime(self, length: int) -> Regime:
        """The table that a sequence of `length` tokens asks for, once all of them are counted."""
        return "long" if length > self._boundary else "short"

    def at(self, offset: int, regime: Regime, dtype: mx.Dtype) -> Rotation:
        """The rotation of tokens at positions offset, offset + 1, ... under a table."""
        scale = self._query_scale
        return Rotation(self._dims, self._periods[regime], offset, scale if scale is None else scale.astype(dtype))

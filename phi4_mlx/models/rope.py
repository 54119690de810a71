"""Rotary positions: one frequency table for plain RoPE, two for LongRoPE.

One table rotates a whole sequence: the short one up to `original_max_position_embeddings` tokens, the long one beyond.
Keys cached under the other table are wrong, and so are the hidden states computed from them, so a crossing runs the
whole sequence again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from phi4_mlx.config.text import ModelConfig
from phi4_mlx.models.fused import rope

Regime = Literal["short", "long"]


def regime_of(length: int, boundary: int | None) -> Regime:
    """The table for `length` tokens; `boundary` is the longest length under the short one, None for plain RoPE."""
    return "long" if boundary is not None and length > boundary else "short"


@dataclass(frozen=True)
class Rotation:
    """The rotation of one forward pass, shared by all layers."""

    dims: int
    periods: mx.array  # [dims / 2], position / period is the angle in radians
    offset: int | mx.array  # position of the first token; [B] where the rows differ
    query_scale: mx.array | None  # [Dh]

    def __call__(self, heads: mx.array, num_queries: int) -> tuple[mx.array, mx.array]:
        """Rotates `heads` [B, H + K, T, Dh], queries before keys, and splits them: [B, H, T, Dh], [B, K, T, Dh]."""
        heads = rope(heads, self.dims, self.offset, self.periods)
        queries, keys = mx.split(heads, [num_queries], axis=1)
        return (queries if self.query_scale is None else queries * self.query_scale), keys


@dataclass(frozen=True)
class PackedRotation:
    """The rotation of packed rows: each sample starts at position 0, under the table of its own length."""

    dims: int
    periods: list[mx.array]  # the short table, the long one, or both
    positions: mx.array  # [B * T]
    long: mx.array  # bool [B, 1, T, 1]: tokens under the long table
    query_scale: mx.array | None  # [Dh]

    def __call__(self, heads: mx.array, num_queries: int) -> tuple[mx.array, mx.array]:
        """See `Rotation`."""
        B, N, T, Dh = heads.shape
        # One token a batch row, since `mx.fast.rope` takes one position a row.
        tokens = heads.transpose(0, 2, 1, 3).reshape(B * T, N, 1, Dh)
        rotated = [
            rope(tokens, self.dims, self.positions, periods).reshape(B, T, N, Dh).transpose(0, 2, 1, 3)
            for periods in self.periods
        ]
        heads = rotated[0] if len(rotated) == 1 else mx.where(self.long, rotated[1], rotated[0])
        queries, keys = mx.split(heads, [num_queries], axis=1)
        return (queries if self.query_scale is None else queries * self.query_scale), keys


class Rope:
    """The frequency tables of a model.

    Under LongRoPE, cos and sin carry a scale `a`, the same for both tables. Attention uses only products of a query and
    a key, so `a * a` goes into the softmax scale, or into the queries where part of the head does not rotate.

    Attributes:
        boundary: the longest sequence under the short table; None for plain RoPE.
        softmax_scale: of attention scores.

    Source: `Phi3RotaryEmbedding` and `_compute_longrope_parameters` in transformers.
    """

    def __init__(self, config: ModelConfig):
        self._dims = config.rotary_dims
        self.boundary = config.original_max_position_embeddings if config.rope_scaling else None
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

    def at(self, offset: int | mx.array, regime: Regime, dtype: mx.Dtype) -> Rotation:
        """The rotation of tokens at positions offset, offset + 1, ... under one table."""
        return Rotation(self._dims, self._periods[regime], offset, self._scale_as(dtype))

    def packed(self, segments: mx.array, dtype: mx.Dtype) -> PackedRotation:
        """The rotation of packed rows.

        Args:
            segments: [B, T], the number of each token's sample; the tokens of a sample are adjacent.
            dtype: of the heads to rotate.
        """
        import numpy as np

        numbers = np.array(segments)
        B, T = numbers.shape
        starts = np.ones((B, T), bool)
        starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        firsts = np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
        positions = np.arange(T) - firsts
        runs = (np.cumsum(starts, axis=1) + T * np.arange(B)[:, None]).ravel()
        lengths = np.bincount(runs)[runs].reshape(B, T)
        long = lengths > (math.inf if self.boundary is None else self.boundary)
        used: list[tuple[Regime, bool]] = [("short", not long.all()), ("long", long.any())]
        return PackedRotation(
            self._dims,
            [self._periods[regime] for regime, some in used if some],
            mx.array(positions.ravel().astype(np.int32)),
            mx.array(long)[:, None, :, None],
            self._scale_as(dtype),
        )

    def _scale_as(self, dtype: mx.Dtype) -> mx.array | None:
        return None if self._query_scale is None else self._query_scale.astype(dtype)

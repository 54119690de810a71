"""Widths that a fast operation needs, reached with zeros, which change no result.

MLX quantises only rows that whole groups divide, and Metal's fused attention takes heads of 64, 80 or 128 alone.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.models.fused import softmax_attention
from phi4_mlx.models.safe import safe

FUSED_WIDTHS = (64, 80, 128)  # head dims of Metal's fused attention over many queries


class PaddedLinear(nn.Linear):
    """A linear layer that can be quantised whatever its inputs: the last group of each row is filled with zeros."""

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **options: Any
    ) -> PaddedQuantizedLinear:
        """The quantised layer; its inputs are padded when it is called."""
        padded = nn.Linear(1, 1, bias="bias" in self)
        padded.update(self.parameters())
        padded.weight = pad(self.weight, padded_width(self.weight.shape[1], group_size or 64))
        layer: PaddedQuantizedLinear = PaddedQuantizedLinear.from_linear(padded, group_size, bits, mode=mode, **options)
        return layer


class PaddedQuantizedLinear(nn.QuantizedLinear):
    """The quantised form of `PaddedLinear`."""

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = super().__call__(pad(x, self.weight.shape[1] * 32 // self.bits))
        return y


def padded_width(width: int, group_size: int) -> int:
    """The inputs of a quantised `PaddedLinear` of `width` inputs."""
    return width + -width % group_size


def pad(x: mx.array, width: int) -> mx.array:
    """The array with zeros behind its last axis, up to `width`."""
    missing = width - x.shape[-1]
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None, width: int | None = None
) -> mx.array:
    """Attention output of heads that all see all.

    Args:
        queries: [B, H, T, Dh].
        keys: [B, H, T, Dh].
        values: [B, H, T, Dh].
        mask: None, bool or additive, broadcastable to [B, H, T, T].
        width: of the padded heads; None for the one that the device's kernel needs.

    Returns:
        [B, H, T, Dh].
    """
    head_dim = queries.shape[-1]
    if width is None:
        own = safe("padding") or mx.default_device() == mx.Device(mx.cpu)
        width = head_dim if own else next((each for each in FUSED_WIDTHS if each >= head_dim), head_dim)
    queries, keys, values = (pad(each, width) for each in (queries, keys, values))
    return softmax_attention(queries, keys, values, head_dim**-0.5, mask)[..., :head_dim]

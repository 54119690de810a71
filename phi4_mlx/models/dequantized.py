"""Quantised layers that dequantise their matrix for each product: the twin of MLX's quantised kernels."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.models.padded import PaddedQuantizedLinear


class DequantizedLinear(nn.QuantizedLinear):
    """The twin of `mlx.nn.QuantizedLinear`."""

    traceable = True

    def __call__(self, x: mx.array) -> mx.array:
        y = x @ _matrix(self, x.dtype).T
        return y + self.bias if "bias" in self else y


class PaddedDequantizedLinear(PaddedQuantizedLinear, DequantizedLinear):
    """The twin of `PaddedQuantizedLinear`, which pads the inputs of the class behind it."""


class DequantizedEmbedding(nn.QuantizedEmbedding):
    """The twin of `mlx.nn.QuantizedEmbedding`; only the head is a product."""

    traceable = True

    def as_linear(self, x: mx.array) -> mx.array:
        """The product with the transposed matrix, [..., D] -> [..., V]."""
        return x @ _matrix(self, x.dtype).T


TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: DequantizedLinear,
    PaddedQuantizedLinear: PaddedDequantizedLinear,
    nn.QuantizedEmbedding: DequantizedEmbedding,
}
"""A quantised layer -> its twin over the same arrays."""


def dequantize_products(model: nn.Module) -> None:
    """Replaces the kernels of all quantised layers by their twins; the arrays stay as they are."""
    for _, module in model.named_modules():
        module.__class__ = TWINS.get(type(module), type(module))


def _matrix(layer: nn.Module, dtype: mx.Dtype) -> mx.array:
    scheme = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **scheme).astype(dtype)

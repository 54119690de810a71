"""LoRA and DoRA layers over a linear layer, which they wrap unchanged.

Source: LoRA (arXiv 2106.09685), equation 3; DoRA (arXiv 2402.09353), equations 5 and 11.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.adapters.folder import PARTS

_ROWS = 1024  # rows of a matrix that are unpacked to fp32 at a time


class LoRALinear(nn.Module):
    """y = W x + scale * (x a) b, over a dense or a quantised linear layer W.

    The product is computed in the dtype of x; a and b may have a higher precision.

    Attributes:
        linear: the base's own layer.
        lora_a: [in, R].
        lora_b: [R, out].
        scale: factor of the product.
        dropout: the probability that training drops an input of `lora_a`, from 0 to below 1.
        on: False makes the layer compute W x.
    """

    kind = "lora"

    def __init__(self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0):
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = lora_a, lora_b
        self.scale, self.dropout, self.on = scale, dropout, True
        self._dropout_key: mx.array | None = None
        self._folded: _Folded | None = None

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        if not self.on:
            return y
        a, b = self.operands(x.dtype)
        return y + (self._dropped(x) @ a) @ b

    def adapter(self) -> tuple[mx.array, ...]:
        """The trained tensors, in the order of `PARTS`."""
        return tuple(self[part] for part in PARTS[self.kind])

    def fix_dropout(self, key: mx.array) -> None:
        """Makes dropout use the mask of a random key until the next call, instead of a new mask in each pass."""
        self._dropout_key = key

    def _dropped(self, x: mx.array) -> mx.array:
        if not (self.training and self.dropout):
            return x
        kept = mx.random.bernoulli(1 - self.dropout, x.shape, key=self._dropout_key)
        return mx.where(kept, x * (1 / (1 - self.dropout)), 0)

    def operands(self, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        """The operands of the forward pass, made once for all calls outside training.

        Args:
            dtype: the dtype of x, and of the result.

        Returns:
            a [in, R] and scale * b [R, out]; for DoRA a, gain * scale * b and gain - 1 [out].
        """
        if self.training:
            return self._fold(dtype)
        arrays = self.adapter()
        if self._folded is None or not self._folded.is_of(arrays, dtype, self.scale):
            self._folded = _Folded(arrays, dtype, self.scale, self._fold(dtype))
        return self._folded.operands

    def _fold(self, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        # In fp32, because half precision would round the scale.
        return self.lora_a.astype(dtype), (self.scale * self.lora_b.astype(mx.float32)).astype(dtype)


class DoRALinear(LoRALinear):
    """y = gain * (W x + scale * (x a) b), so that row i of the effective matrix has the norm m[i]; then a bias.

    As in the paper, the norm in gain = m / norm is a constant to the gradient. It is computed from W a [R, out] and
    a^T a [R, R], without the sum of the matrices and without unpacking a quantised W.

    Attributes:
        m: the trained norms of the rows, [out], in fp32.
    """

    kind = "dora"

    def __init__(
        self,
        linear: nn.Module,
        lora_a: mx.array,
        lora_b: mx.array,
        m: mx.array | None,
        scale: float,
        dropout: float = 0.0,
    ):
        super().__init__(linear, lora_a, lora_b, scale, dropout)
        self._row_squares = _row_squares(linear)  # [out]
        self.m = mx.sqrt(self._row_squares) if m is None else m

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        if not self.on:
            return y
        a, b, excess = self.operands(x.dtype)
        return y + (self._without_bias(y) * excess + (self._dropped(x) @ a) @ b)

    def _fold(self, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        gain = self.m / mx.stop_gradient(self._norms(dtype))
        # gain - 1, because half precision would round a gain close to 1.
        return self.lora_a.astype(dtype), (gain * self.scale * self.lora_b).astype(dtype), (gain - 1).astype(dtype)

    def _without_bias(self, y: mx.array) -> mx.array:
        """W x, from an output of the linear layer, which may have a bias."""
        bias = self.linear.get("bias")
        return y if bias is None else y - bias

    def _norms(self, dtype: mx.Dtype) -> mx.array:
        """The norms of the rows of W + scale * (a b)^T, [out]."""
        a, b = self.lora_a.astype(mx.float32), self.scale * self.lora_b.astype(mx.float32)
        cross = self._without_bias(self.linear(a.T.astype(dtype))).astype(mx.float32)  # [R, out]
        squares = self._row_squares + ((2 * cross + (a.T @ a) @ b) * b).sum(axis=0)
        if (add_up := getattr(self.linear, "add_up", None)) is not None:  # its columns are split over ranks
            squares = add_up(squares)
        return mx.sqrt(mx.maximum(squares, 1e-30))  # a row of zeros stays zero


@dataclass(frozen=True, eq=False)
class _Folded:
    """Operands and their inputs. Arrays are never changed in place, so the same object has the same value."""

    arrays: tuple[mx.array, ...]
    dtype: mx.Dtype
    scale: float
    operands: tuple[mx.array, ...]

    def is_of(self, arrays: tuple[mx.array, ...], dtype: mx.Dtype, scale: float) -> bool:
        same = all(old is new for old, new in zip(self.arrays, arrays, strict=True))
        return same and (self.dtype, self.scale) == (dtype, scale)


def _row_squares(linear: nn.Module) -> mx.array:
    """The sums of squares of the rows of a layer's matrix, [out], in fp32."""
    parts = []
    for first in range(0, linear.weight.shape[0], _ROWS):
        rows = linear.weight[first : first + _ROWS]
        if isinstance(linear, nn.QuantizedLinear):
            biases = linear.get("biases")
            rows = mx.dequantize(
                rows,
                linear.scales[first : first + _ROWS],
                None if biases is None else biases[first : first + _ROWS],
                group_size=linear.group_size,
                bits=linear.bits,
                mode=linear.mode,
            )
        parts.append(mx.square(rows.astype(mx.float32)).sum(axis=1))
        mx.eval(parts[-1])
    return mx.concatenate(parts)

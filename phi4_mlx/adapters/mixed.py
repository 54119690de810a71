"""Linear layers with the adapters of several rows side by side.

y = W x + sum over adapters of ((x a) * mask) b, where the mask of a row is true for the columns of its own adapter. A
row without an adapter gets y + 0, the base's own y.

Shapes: B rows, T tokens, R rank.

Source: LoRA (arXiv 2106.09685), equation 3; DoRA (arXiv 2402.09353), equation 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.adapters.folder import Adapter
from phi4_mlx.adapters.layers import layer_of

Columns = tuple[tuple[int, int], ...]  # (number of an adapter among those in use, its columns), in order
Scheme = tuple[int, int]  # group size and bits


class Rows:
    """The masks of a forward pass.

    Attributes:
        layouts: the columns that each mask is for.
        given: the masks, bool [B, 1, R] each, true where a row uses a column; none where one adapter is for all rows.
        masks: what the layers read: `given`, or the inputs of a trace in their place.
    """

    def __init__(self) -> None:
        self.layouts: list[Columns] = []
        self.given: list[mx.array] = []
        self.masks: Sequence[mx.array] = ()

    def number(self, columns: Columns) -> int:
        """The number of the mask for these columns."""
        if columns not in self.layouts:
            self.layouts.append(columns)
        return self.layouts.index(columns)

    def mask(self, number: int) -> mx.array | None:
        """The mask of that number; None where one adapter is for all rows."""
        return self.masks[number] if self.masks else None

    def set(self, adapters: Sequence[int]) -> None:
        """Makes the masks of rows under the adapters of these numbers; -1 for none."""
        self.given = []
        if len({*adapters}) > 1:
            import numpy as np  # not for text alone, where it would take part of the start

            own = np.array(adapters)[:, None, None]
            self.given = [mx.array(own == np.repeat(*np.array(columns).T)) for columns in self.layouts]


@dataclass(eq=False)
class Product:
    """One adapter's (x a) b on one layer.

    Attributes:
        arrays: "a" [in, R] and "b" [R, out] with the scale in it; if they are quantised, "a" is [R, in], and there are
            "a_scales", "a_biases", "b_scales" and "b_biases".
        scheme: of quantised matrices; None for dense ones.
        excess: DoRA's gain - 1, [1, out]; None for LoRA.
    """

    arrays: dict[str, mx.array]
    scheme: Scheme | None
    excess: mx.array | None

    @classmethod
    def of(
        cls, linear: nn.Module, adapter: Adapter, path: str, dtype: mx.Dtype, *, dequantized: bool = False
    ) -> Product:
        """The product of an adapter's layer, computed from its tensors in the dtype of the hidden states."""
        excess, scheme = None, adapter.scheme
        if adapter.scheme is None:
            a, b, *excesses = layer_of(linear, adapter, path).operands(dtype)
            arrays = {"a": mx.contiguous(a), "b": b}  # of PEFT, a is a transposed view
            excess = excesses[0][None] if excesses else None
        else:
            given = {name: adapter.tensors[f"{path}.lora_{name}"] for name in ("a", "b")}
            for name in ("a_scales", "a_biases", "b_scales", "b_biases"):
                factor = adapter.scale if name.startswith("b") else 1.0
                array = adapter.tensors[f"{path}.lora_{name}"].astype(mx.float32)
                given[name] = (array * factor).astype(dtype)
            arrays = given
            if dequantized:
                a, b = (
                    mx.dequantize(given[name], given[f"{name}_scales"], given[f"{name}_biases"], *adapter.scheme)
                    for name in ("a", "b")
                )
                arrays, scheme = {"a": mx.contiguous(a.T), "b": b}, None
        mx.eval(arrays, excess)
        return cls(arrays, scheme, excess)

    @property
    def rank(self) -> int:
        """R."""
        return len(self.arrays["b"])

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for products whose matrices can stand side by side."""
        return self.scheme, self.arrays["a"].dtype

    @property
    def is_zero(self) -> bool:
        """True if b is zero everywhere, as it is in a new adapter."""
        b = self.arrays["b"]
        if self.scheme is not None:
            b = mx.dequantize(b, self.arrays["b_scales"], self.arrays["b_biases"], *self.scheme)
        return not mx.any(b != 0)


class LowRank(nn.Module):
    """(x a) b of one adapter or of several side by side, with the arrays of `Product`.

    Args:
        arrays: as `Product.arrays`.
        scheme: as `Product.scheme`.
        mask: the number of the mask for its columns.
    """

    traceable = True

    def __init__(self, arrays: Mapping[str, mx.array], scheme: Scheme | None, mask: int):
        super().__init__()
        for name, array in arrays.items():
            self[name] = array
        self.group_size, self.bits = scheme or (0, 0)
        self.mask = mask

    def __call__(self, x: mx.array, rows: Rows) -> mx.array:
        """[B, T, in] -> [B, T, out]."""
        low, mask = self._times(x, "a", transpose=True), rows.mask(self.mask)
        return self._times(low if mask is None else mx.where(mask, low, 0), "b", transpose=False)

    def _times(self, x: mx.array, name: str, transpose: bool) -> mx.array:
        matrix: mx.array = self[name]
        if not self.bits:
            return x @ matrix
        scales, biases = self[f"{name}_scales"], self[f"{name}_biases"]
        return mx.quantized_matmul(x, matrix, scales, biases, transpose, group_size=self.group_size, bits=self.bits)


class Gain(nn.Module):
    """DoRA's gain - 1: a row of `excess` [n, out] for each adapter.

    Args:
        excess: [n, out].
        mask: the number of the mask for its n columns.
    """

    traceable = True

    def __init__(self, excess: mx.array, mask: int):
        super().__init__()
        self.excess, self.mask = excess, mask

    def __call__(self, rows: Rows) -> mx.array:
        """[B, 1, out]; [1, out] where one adapter is for all rows."""
        mask = rows.mask(self.mask)
        return self.excess if mask is None else mask.astype(self.excess.dtype) @ self.excess


class MixedLinear(nn.Module):
    """A linear layer with the adapters in use.

    Args:
        linear: the base's own layer.
        products: one for each kind.
        gain: of the DoRA adapters among them; None without.
        rows: the masks of the pass.
    """

    traceable = True

    def __init__(self, linear: nn.Module, products: Sequence[LowRank], gain: Gain | None, rows: Rows):
        super().__init__()
        self.linear, self.rows, self.count = linear, rows, len(products)
        for number, product in enumerate(products):
            self[f"product_{number}"] = product
        if gain is not None:
            self.gain = gain

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        added = self.product_0(x, self.rows)
        if "gain" in self:
            bias = self.linear.get("bias")
            added = (y if bias is None else y - bias) * self.gain(self.rows) + added
        for number in range(1, self.count):
            added = added + self[f"product_{number}"](x, self.rows)
        return y + added


def mixed_layer(linear: nn.Module, parts: Sequence[tuple[int, Product]], rows: Rows) -> MixedLinear:
    """A layer under the adapters of these numbers, one or more.

    Matrices of a kind are joined. The quantised ones of an adapter become parts of the joined ones, so that they take
    memory once; columns of a dense one would not be in a row in memory.
    """
    kinds: dict[object, list[tuple[int, Product]]] = {}
    for number, product in parts:
        kinds.setdefault(product.kind, []).append((number, product))
    products = [_joined(group, rows) for group in kinds.values()]
    excesses = [(number, product.excess) for number, product in parts if product.excess is not None]
    gain = None
    if excesses:
        columns = tuple((number, 1) for number, _ in excesses)
        gain = Gain(mx.concatenate([excess for _, excess in excesses]), rows.number(columns))
        mx.eval(gain.excess)
    return MixedLinear(linear, products, gain, rows)


def _joined(group: Sequence[tuple[int, Product]], rows: Rows) -> LowRank:
    products = [product for _, product in group]
    columns = tuple((number, product.rank) for number, product in group)
    arrays, scheme = products[0].arrays, products[0].scheme
    if len(products) > 1:
        arrays = {
            name: mx.concatenate([product.arrays[name] for product in products], axis=int(name == "a" and not scheme))
            for name in arrays
        }
        if scheme is not None:
            starts = accumulate((ranks for _, ranks in columns), initial=0)
            for product, (start, end) in zip(products, pairwise(starts), strict=True):
                product.arrays = {name: array[start:end] for name, array in arrays.items()}
        mx.eval(arrays, [product.arrays for product in products])
    return LowRank(arrays, scheme, rows.number(columns))

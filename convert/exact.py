"""The weights of a checkpoint in fp32: dequantised, with an adapter merged in, and rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from phi4_mlx.adapters.folder import FULL, Adapter
from phi4_mlx.adapters.layers import check_fit
from phi4_mlx.checkpoint import empty_model, stored_tensors
from phi4_mlx.config.fields import Config

from .quantize import Scheme
from .weights import Parameter, plan, read_rows


def with_adapter(adapter: Adapter, path: str, rows: mx.array, first: int, last: int) -> mx.array:
    """Rows of a matrix [out, in], or elements of a vector, with an adapter on.

    Args:
        adapter: changes the layer at `path`.
        path: of the layer.
        rows: those from `first` to before `last`, fp32.
        first: the first row.
        last: the one after the last.

    Returns:
        The same rows in fp32.
    """
    if adapter.kind == FULL:
        whole = adapter.tensors.get(f"{path}.weight", adapter.tensors.get(path))
        assert whole is not None
        return whole[first:last].astype(mx.float32)
    a, b, *m = (array.astype(mx.float32) for array in adapter.of(path))
    rows = rows + adapter.scale * (a @ b[:, first:last]).T
    for norms in m:
        found = mx.linalg.norm(rows, axis=1)
        rows = (norms[first:last] / mx.maximum(found, 1e-15))[:, None] * rows
    return rows


def dense(arrays: Sequence[mx.array], scheme: Scheme | None) -> mx.array:
    """Rows of a matrix in fp32, from the arrays that a file stores."""
    if scheme is None:
        return arrays[0].astype(mx.float32)
    weight, *rest = arrays
    if scheme.mode == "affine":
        rest = [array.astype(mx.float32) for array in rest]  # else the product would be rounded to their dtype
    return mx.dequantize(weight, *rest, **vars(scheme)).astype(mx.float32)


@dataclass(frozen=True)
class ExactParameter(Parameter):
    """A parameter that is rounded once, from fp32, to the dtype of its output.

    Attributes:
        adapter: the adapter that changes it; None for none.
    """

    adapter: Adapter | None

    def base(self, first: int, last: int) -> mx.array:
        """Rows from `first` to before `last` without the adapter, in fp32, not yet computed."""
        return dense([read_rows(stored, first, last) for stored in self.inputs], self.packed)[..., : self.width]

    def exact(self, first: int, last: int) -> mx.array:
        """As `base`, with the adapter."""
        rows = self.base(first, last)
        return with_adapter(self.adapter, self.path, rows, first, last) if self.adapter else rows

    def converted(self, first: int, last: int) -> list[mx.array]:
        """Rows from `first` to before `last`, as bytes, not yet computed."""
        return self.as_bytes([self.exact(first, last)])


def exact_parameters(folder: Path, config: Config, adapter: Adapter | None) -> list[ExactParameter]:
    """Plans every parameter of a dense model with an adapter merged in.

    Args:
        folder: the checkpoint, dense or quantised.
        config: its config.
        adapter: the adapter; None for none.

    Raises:
        CheckpointError: a tensor is missing, damaged, left over or of another shape, or the adapter does not fit.
    """
    infos = stored_tensors(folder, config).infos
    if adapter:
        check_fit(empty_model(config, infos), adapter)
    changed = {*adapter.weights} if adapter else set()
    packed = any(name.endswith(".scales") for name in infos)
    return [
        ExactParameter(**vars(each), adapter=adapter if each.path in changed else None)
        for each in plan(folder, config, None, None, dequantize=packed)
    ]

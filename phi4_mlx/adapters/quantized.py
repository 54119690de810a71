"""Quantised LoRA: matrices with the rank first, [R, in] and [R, out], quantised along their rows.

So the matrices of several adapters stand side by side by rows, whatever their ranks. In a folder, adapter_config.json
has `"quantization": {"group_size": 64, "bits": 8}` beside mlx-lm's fields, and each layer has the tensors
`<path>.lora_a` and `<path>.lora_b` (uint32) with `_scales` and `_biases`, such as `<path>.lora_a_scales`.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from phi4_mlx.adapters.folder import Adapter
from phi4_mlx.errors import RequestError

GROUP_SIZES = (64, 32)  # the first that divides all widths is taken


def quantized(adapter: Adapter, bits: int = 8) -> Adapter:
    """Quantises a dense LoRA, in the largest groups that fit it.

    Args:
        adapter: a LoRA; its other fields stay.
        bits: of a number.

    Raises:
        RequestError: it is not a LoRA, or a width is not a multiple of 32.
    """
    if adapter.kind != "lora" or adapter.scheme is not None:
        raise RequestError(f"{adapter.source} is not a dense LoRA adapter, and only those are quantised")
    widths = {width for path in adapter.paths for width in adapter.shape(path)[::2]}
    size = next((size for size in GROUP_SIZES if not any(width % size for width in widths)), None)
    if size is None:
        odd = next(width for width in sorted(widths) if width % GROUP_SIZES[-1])
        raise RequestError(
            f"{adapter.source} has a matrix of width {odd}, and {GROUP_SIZES[-1]} must divide it; keep it in 16 bits"
        )
    tensors: dict[str, mx.array] = {}
    for path in adapter.paths:
        a, b = adapter.of(path)
        for part, matrix in (("lora_a", a.T), ("lora_b", b)):
            arrays = mx.quantize(matrix, group_size=size, bits=bits)
            names = (f"{path}.{part}{suffix}" for suffix in ("", "_scales", "_biases"))
            tensors |= dict(zip(names, arrays, strict=True))
    return replace(adapter, tensors=tensors, scheme=(size, bits))


def dense(adapter: Adapter) -> Adapter:
    """The same adapter with dense matrices, [in, R] and [R, out]; itself if it is dense."""
    if adapter.scheme is None:
        return adapter
    size, bits = adapter.scheme
    tensors: dict[str, mx.array] = {}
    for path in adapter.paths:
        parts = adapter.of(path)
        a, b = (mx.dequantize(*parts[first : first + 3], group_size=size, bits=bits) for first in (0, 3))
        tensors |= {f"{path}.lora_a": a.T, f"{path}.lora_b": b}
    return replace(adapter, tensors=tensors, scheme=None)

"""The dtypes of safetensors: their names, their sizes, and the mlx dtypes that hold the same numbers.

Source: the format's description in the `safetensors` README.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import mlx.core as mx


class Dtype(NamedTuple):
    """One dtype: its size in bits, and its attribute in `mlx.core` ("" if mlx does not have it)."""

    bits: int
    mlx_name: str = ""


DTYPES = {
    "BOOL": Dtype(8, "bool_"),
    "U8": Dtype(8, "uint8"), "I8": Dtype(8, "int8"),
    "U16": Dtype(16, "uint16"), "I16": Dtype(16, "int16"),
    "U32": Dtype(32, "uint32"), "I32": Dtype(32, "int32"),
    "U64": Dtype(64, "uint64"), "I64": Dtype(64, "int64"),
    "F16": Dtype(16, "float16"), "BF16": Dtype(16, "bfloat16"),
    "F32": Dtype(32, "float32"), "F64": Dtype(64, "float64"), "C64": Dtype(64, "complex64"),
    "F4": Dtype(4), "F6_E2M3": Dtype(6), "F6_E3M2": Dtype(6),
    "F8_E5M2": Dtype(8), "F8_E4M3": Dtype(8), "F8_E8M0": Dtype(8), "F8_E4M3FNUZ": Dtype(8), "F8_E5M2FNUZ": Dtype(8),
}  # fmt: skip
"""Name in a safetensors header -> the dtype."""

FLOATS = ("F16", "BF16", "F32")
"""The dtypes that the weights of a model or an adapter may have before they are quantised."""


def mlx_dtype(name: str) -> mx.Dtype:
    """The mlx dtype for a name in a safetensors header, such as "BF16"."""
    import mlx.core as mx  # late: reading a header does not need mlx

    return getattr(mx, DTYPES[name].mlx_name)


def name_of(dtype: mx.Dtype) -> str:
    """The name of an mlx dtype in a safetensors header, such as "BF16"."""
    return next(name for name, each in DTYPES.items() if each.mlx_name and mlx_dtype(name) == dtype)

"""Tensors of a GGUF file, read, computed and written in blocks of rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import BinaryIO

import mlx.core as mx

from phi4_mlx.convert.exact import ExactParameter
from phi4_mlx.errors import RequestError

_Q8_0_GROUP = 32  # numbers of a row that share a scale in F16: 34 bytes
_LARGEST = {"F16": 65504, "Q8_0": 127 * 65504, "BF16": 255 * 2.0**120, "F32": (2**24 - 1) * 2.0**104}
# Kept in F16 beside Q8_0: on tiny random models these make nine tenths of the KL divergence, 3e-3 of 3.3e-3 nats.
_SENSITIVE = ("model.embed_tokens", "lm_head", "self_attn.qkv_proj")

# Name in a checkpoint, without ".weight" -> name in GGUF.
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GGUFTensor:
    """A tensor on its way from a checkpoint to the file, which takes the place of a NumPy array in the writer.

    Attributes:
        parameter: its source.
        kind: its type in the file: F32 for vectors; F16 in place of Q8_0 for the embedding, the head, queries, keys and
            values, and for matrices whose rows Q8_0's groups do not divide.
        progress: called with the bytes of the source that are done.
    """

    def __init__(self, parameter: ExactParameter, kind: str):
        """Plans a tensor; `kind` is the type of matrices."""
        self._is_vector = len(parameter.inputs[0].info.shape) == 1
        if kind == "Q8_0" and (parameter.path.endswith(_SENSITIVE) or parameter.width % _Q8_0_GROUP):
            kind = "F16"
        self.parameter, self.kind = parameter, "F32" if self._is_vector else kind
        self.progress: Callable[[int], object] = lambda count: None

    @property
    def name(self) -> str:
        """Its name in the file."""
        path = self.parameter.path.removesuffix(".weight")
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
        return f"blk.{found[1]}.{_NAMES[found[2]]}.weight" if found else f"{_NAMES[path]}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns, or the length of a vector."""
        rows = self.parameter.rows
        return (rows,) if self._is_vector else (rows, self.parameter.width)

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        numbers = math.prod(self.shape)
        return numbers // _Q8_0_GROUP * 34 if self.kind == "Q8_0" else numbers * (4 if self.kind == "F32" else 2)

    def tofile(self, file: BinaryIO) -> None:
        """Writes its bytes, as the method of NumPy's arrays."""
        for first, last in self.parameter.blocks():
            file.write(self._bytes(first, last))
            self.progress(self.parameter.input_bytes * (last - first) // self.parameter.rows)
        mx.clear_cache()

    def _bytes(self, first: int, last: int) -> memoryview:
        rows = self.parameter.exact(first, last)
        if not mx.abs(rows).max().item() <= _LARGEST[self.kind]:
            raise RequestError(
                f"{self.parameter.name} has numbers too large for {self.kind}{self.parameter.such_as(first, last)}; "
                "use --type BF16"
            )
        if self.kind == "Q8_0":
            import numpy as np
            from gguf import GGMLQuantizationType, quants

            return quants.quantize(np.array(rows), GGMLQuantizationType.Q8_0).data.cast("B")
        rounded = rows.astype({"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}[self.kind])
        return memoryview(rounded.view(mx.uint8))

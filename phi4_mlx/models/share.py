"""One rank's share of a model: which rank it is, and which parts of the checkpoint's tensors it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from phi4_mlx.files.safetensors import TensorInfo, tensor_bytes

Parallel = Literal["tensor", "pipeline"]


@dataclass(frozen=True)
class Share:
    """The place of one rank among those that hold a model together.

    Attributes:
        parallel: "tensor" splits every matrix, "pipeline" deals whole blocks.
        rank: from 0; rank 0 has the logits.
        size: the number of ranks.
    """

    parallel: Parallel
    rank: int
    size: int


@dataclass(frozen=True)
class Piece:
    """A part of a tensor of the checkpoint.

    Attributes:
        name: of the tensor, as the whole model calls it.
        axis: that the ranges cut, 0 or 1.
        ranges: of indices along the axis, in order; None for the whole tensor.
    """

    name: str
    axis: int = 0
    ranges: tuple[tuple[int, int], ...] | None = None

    def of(self, info: TensorInfo) -> TensorInfo:
        """The part's dtype and shape; its place in the file is the whole tensor's."""
        if self.ranges is None:
            return info
        shape = list(info.shape)
        shape[self.axis] = sum(end - start for start, end in self.ranges)
        return replace(info, shape=tuple(shape))


Pieces = Mapping[str, Piece]
"""Name in a share -> the part of the checkpoint that it is."""


@dataclass(frozen=True)
class Holding:
    """The whole model of which a rank has a share, and the rank's part of its tensors.

    Attributes:
        config: the whole model's.
        infos: its tensors.
        pieces: those that the rank holds.
    """

    config: Any
    infos: Mapping[str, TensorInfo]
    pieces: Pieces


def pieces_bytes(pieces: Pieces, infos: Mapping[str, TensorInfo]) -> int:
    """Bytes of all parts."""
    parts = (piece.of(infos[piece.name]) for piece in pieces.values())
    return sum(tensor_bytes(part.dtype, part.shape) for part in parts)


def part_of(total: int, rank: int, size: int, unit: int = 1) -> tuple[int, int]:
    """The range of one rank where `total` is dealt in whole units, as evenly as they allow; the last one may be cut."""
    units = math.ceil(total / unit)
    start, end = (min(total, units * each // size * unit) for each in (rank, rank + 1))
    return start, end

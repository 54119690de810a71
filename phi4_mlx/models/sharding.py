"""Models that several ranks hold together: what divides, which way to take, and the share of one rank.

**Tensor parallel** splits every matrix, for speed over a fast link: attention by heads, the MLP by its width, the
embedding and the head by vocabulary. **Pipeline** deals whole blocks, for memory over any link.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from phi4_mlx.adapters.folder import FULL, Adapter
from phi4_mlx.adapters.quantized import dense
from phi4_mlx.config.fields import Config
from phi4_mlx.errors import RequestError
from phi4_mlx.files.safetensors import TensorInfo
from phi4_mlx.models import pipeline, sambay, tensor_parallel
from phi4_mlx.models.causal_lm import CausalLM
from phi4_mlx.models.sambay_stage import SambaYStage
from phi4_mlx.models.share import Holding, Parallel, Piece, Pieces, Share, pieces_bytes

FAST_BACKENDS = ("jaccl", "nccl")
"""The backends whose exchanges are fast enough for two of them in each layer."""


def check_share(config: Config, parallel: Parallel, size: int, infos: Mapping[str, TensorInfo] | None = None) -> None:
    """Checks that a model can be held by so many ranks together.

    Args:
        config: the model's.
        parallel: the way.
        size: the number of ranks.
        infos: the tensors of the whole model, for the groups of quantised matrices; None to leave them unchecked.

    Raises:
        RequestError: something does not divide; names it, the numbers, and the way out.
    """
    if parallel == "pipeline":
        if size > (most := pipeline.last_start(config) + 1):
            blocks = config.num_hidden_layers
            together = f", the last {blocks - most + 1} of which stay together" if most < blocks else ""
            raise RequestError(f"{size} ranks cannot share {blocks} blocks{together}; start at most {most}")
        return
    tensor_parallel.check_split(config, size, infos)


def choose_parallel(
    config: Config, size: int, backend: str, infos: Mapping[str, TensorInfo] | None = None
) -> tuple[Parallel, str]:
    """The way to take where none is asked for, and the reason for it; arguments as for `check_share`."""
    try:
        check_share(config, "tensor", size, infos)
    except RequestError as error:
        return "pipeline", str(error)
    if backend not in FAST_BACKENDS:
        return "pipeline", f"over {backend} the two sums a layer of tensor parallel take longer than they save"
    return "tensor", f"the model divides by {size}, and {backend} is fast enough for two sums a layer"


def share_config(config: Any, share: Share, infos: Mapping[str, TensorInfo]) -> Any:
    """The config of one rank's share, of which its shapes, caches and costs follow."""
    if share.parallel == "tensor":
        return tensor_parallel.split_config(config, share)
    return replace(config, num_hidden_layers=len(pipeline.deal_blocks(config, infos, share.size)[share.rank]))


def share_pieces(config: Any, share: Share, infos: Mapping[str, TensorInfo]) -> Pieces:
    """The parts of the checkpoint's tensors that one rank holds."""
    if share.parallel == "tensor":
        return tensor_parallel.pieces_of(config, infos, share)
    return pipeline.pieces_of(config, infos, share)


def share_plan(config: Any, infos: Mapping[str, TensorInfo], parallel: Parallel, size: int) -> list[int]:
    """Bytes of weights that each rank reads and holds."""
    return [pieces_bytes(share_pieces(config, Share(parallel, rank, size), infos), infos) for rank in range(size)]


def join_ranks(model: CausalLM, holding: Holding, share: Share, group: mx.distributed.Group) -> None:
    """Makes a loaded share run together with those of the other ranks of a group."""
    model.holding = holding
    if share.parallel == "tensor":
        tensor_parallel.as_part(model, holding.config, share, group)
    else:
        kind: Any = SambaYStage if isinstance(model, sambay.Model) else pipeline.Stage
        dealt = pipeline.deal_blocks(holding.config, holding.infos, share.size)
        pipeline.as_stage(model, kind, dealt, share.rank, group)


def adapter_part(adapter: Adapter, holding: Holding) -> Adapter:
    """One rank's part of an adapter, by the names that the rank's share has.

    Args:
        adapter: for the whole model, which it must fit.
        holding: the rank's share.

    Returns:
        An adapter for the share, without tensors if it adapts nothing there.
    """
    if any(piece.ranges for piece in holding.pieces.values()):
        adapter = dense(adapter)  # a cut may lie within a group
    tensors: dict[str, mx.array] = {}
    if adapter.kind == FULL:
        for name, piece in holding.pieces.items():
            if piece.name in adapter.tensors:
                tensors[name] = _cut(adapter.tensors[piece.name], piece.axis, piece.ranges)
        return replace(adapter, tensors=tensors)
    matrices = {
        piece.name.removesuffix(".weight"): (name.removesuffix(".weight"), piece)
        for name, piece in holding.pieces.items()
        if name.endswith(".weight")
    }
    for name, array in adapter.tensors.items():
        path, _, part = name.rpartition(".")
        if path in matrices:
            own, piece = matrices[path]
            tensors[f"{own}.{part}"] = _adapter_tensor(part, array, piece, holding)
    return replace(adapter, tensors=tensors, num_layers=None, keys=None, only_layers=None)


def _adapter_tensor(part: str, array: mx.array, piece: Piece, holding: Holding) -> mx.array:
    """The part of lora_a [in, R], lora_b [R, out] or m [out] of a matrix of which a rank has a part."""
    ranges = piece.ranges
    if ranges is None:
        return array
    if piece.axis == 1:
        stored = holding.infos[piece.name].shape[1]  # packed, if quantised
        width = array.shape[0]
        inputs = tuple((start * width // stored, end * width // stored) for start, end in ranges)
        return _cut(array, 0, inputs) if part == "lora_a" else array
    return array if part == "lora_a" else _cut(array, array.ndim - 1, ranges)


def _cut(array: mx.array, axis: int, ranges: Sequence[tuple[int, int]] | None) -> mx.array:
    """The indices of some ranges along an axis."""
    if ranges is None:
        return array
    parts = [mx.split(array, [start, end], axis=axis)[1] for start, end in ranges]
    return mx.contiguous(mx.concatenate(parts, axis=axis))

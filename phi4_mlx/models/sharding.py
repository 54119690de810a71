"""Models that several ranks hold together: what divides, which way to take, and the share of one rank.

**Tensor parallel** splits every matrix, for speed over a fast link: attention by heads, the MLP by its width, the
embedding and the head by vocabulary. **Pipeline** deals whole blocks, for memory over any link.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from phi4_mlx.config.fields import Config
from phi4_mlx.errors import RequestError
from phi4_mlx.files.safetensors import TensorInfo
from phi4_mlx.models import pipeline, tensor_parallel
from phi4_mlx.models.causal_lm import CausalLM
from phi4_mlx.models.share import Parallel, Pieces, Share, pieces_bytes

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
        if size > config.num_hidden_layers:
            raise RequestError(
                f"{size} ranks cannot share {config.num_hidden_layers} blocks; start at most as many ranks as blocks"
            )
        return
    tensor_parallel.check_split(config, size, infos)


def choose_parallel(config: Config, size: int, backend: str) -> tuple[Parallel, str]:
    """The way to take where none is asked for, and the reason for it."""
    try:
        check_share(config, "tensor", size)
    except RequestError as error:
        return "pipeline", str(error)
    if backend not in FAST_BACKENDS:
        return "pipeline", f"over {backend} the two sums a layer of tensor parallel take longer than they save"
    return "tensor", f"the model divides by {size}, and {backend} is fast enough for two sums a layer"


def share_config(config: Any, share: Share, infos: Mapping[str, TensorInfo]) -> Any:
    """The config of one rank's share, of which its shapes, caches and costs follow."""
    if share.parallel == "tensor":
        return tensor_parallel.split_config(config, share)
    return replace(config, num_hidden_layers=len(pipeline.deal_blocks(infos, share.size)[share.rank]))


def share_pieces(config: Any, share: Share, infos: Mapping[str, TensorInfo]) -> Pieces:
    """The parts of the checkpoint's tensors that one rank holds."""
    if share.parallel == "tensor":
        return tensor_parallel.pieces_of(config, infos, share)
    return pipeline.pieces_of(infos, share)


def share_plan(config: Any, infos: Mapping[str, TensorInfo], parallel: Parallel, size: int) -> list[int]:
    """Bytes of weights that each rank reads and holds."""
    return [pieces_bytes(share_pieces(config, Share(parallel, rank, size), infos), infos) for rank in range(size)]


def prepare_share(model: CausalLM, share: Share) -> None:
    """Removes what other ranks hold from a model with the config of a share, before its weights are loaded."""
    if share.parallel == "pipeline":
        pipeline.without_ends(model, share)


def join_ranks(model: CausalLM, config: Any, share: Share, group: mx.distributed.Group) -> None:
    """Makes a loaded share run together with those of the other ranks of a group; `config` is the whole model's."""
    if share.parallel == "tensor":
        tensor_parallel.as_part(model, config, share, group)
    else:
        pipeline.as_stage(model, share, group)

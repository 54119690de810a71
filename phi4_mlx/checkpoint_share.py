"""A folder -> one rank's share of its model; the rest of the weights is never read."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from phi4_mlx.checkpoint import check_tensors, empty_model, load_config, stored_tensors
from phi4_mlx.files.dtypes import mlx_dtype
from phi4_mlx.files.safetensors import Stored
from phi4_mlx.files.tensor_parts import read_part
from phi4_mlx.models.causal_lm import CausalLM
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.sharding import check_share, join_ranks, prepare_share, share_config, share_pieces
from phi4_mlx.models.share import Piece, Share


def load_share(folder: Path, share: Share, group: mx.distributed.Group) -> LanguageModel:
    """The share of one rank, which runs together with those of the others.

    Args:
        folder: of the package.
        share: the place of this rank.
        group: all ranks.

    Returns:
        A model whose `hidden` all ranks call with the same arguments, each with its own cache.

    Raises:
        ConfigError, CheckpointError: as `load_model`.
        RequestError: the model does not divide so.
    """
    config = load_config(folder)
    tensors = stored_tensors(folder, config)
    whole = empty_model(config, tensors.infos)  # lazy: it takes no memory
    tensors = tensors.shaped(whole)
    wanted = check_tensors(whole, tensors.infos)
    infos = {name: info for name, info in tensors.infos.items() if name in wanted}
    check_share(config, share.parallel, share.size, infos)
    pieces = share_pieces(config, share, infos)
    model = empty_model(
        share_config(config, share, infos), {name: piece.of(infos[piece.name]) for name, piece in pieces.items()}
    )
    assert isinstance(model, CausalLM)
    prepare_share(model, share)
    model.load_weights([(name, _read(tensors.model[piece.name], piece)) for name, piece in pieces.items()])
    model.eval()
    join_ranks(model, config, share, group)
    return model


def _read(stored: Stored, piece: Piece) -> mx.array:
    info = piece.of(stored.info)
    found = mx.array(memoryview(read_part(stored, piece.axis, piece.ranges)), mx.uint8)
    return found.view(mlx_dtype(info.dtype)).reshape(info.shape)

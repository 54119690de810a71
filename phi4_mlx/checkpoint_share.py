"""A folder -> one rank's share of its model; the rest of the weights is never read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from phi4_mlx.adapters.folder import Adapter
from phi4_mlx.adapters.layers import check_fit, read_adapter
from phi4_mlx.adapters.shipped import add_shipped
from phi4_mlx.checkpoint import (
    StoredTensors,
    check_finite,
    check_tensors,
    empty_model,
    load_config,
    shipped_with,
    stored_tensors,
)
from phi4_mlx.config.fields import Config
from phi4_mlx.files.dtypes import mlx_dtype
from phi4_mlx.files.safetensors import Stored, TensorInfo
from phi4_mlx.files.tensor_parts import read_part
from phi4_mlx.models.causal_lm import CausalLM
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.pipeline import deal_blocks, keep_blocks
from phi4_mlx.models.sharding import adapter_part, check_share, join_ranks, share_config, share_pieces
from phi4_mlx.models.share import Holding, Piece, Share


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
    whole, tensors = _checked(folder, config)
    infos = tensors.infos
    check_share(config, share.parallel, share.size, infos)
    pieces = share_pieces(config, share, infos)
    holding = Holding(config, infos, pieces)
    shipped = shipped_with(whole, folder, tensors)
    model = empty_share(whole, holding, share)
    weights = [
        (name, _read(tensors.model[piece.name], piece, later=model.on_demand(name))) for name, piece in pieces.items()
    ]
    now = [(pieces[name].name, array) for name, array in weights if not model.on_demand(name)]
    check_finite(folder, now)
    mx.eval(now)
    model.load_weights(weights)
    model.eval()
    add_shipped(model, {name: adapter_part(adapter, holding) for name, adapter in shipped.items()})
    join_ranks(model, holding, share, group)
    return model


def tensor_infos(folder: Path, config: Config) -> dict[str, TensorInfo]:
    """The tensors of a whole model, from the headers of its files.

    Args:
        folder: of the package.
        config: the model's.

    Raises:
        CheckpointError: a header is damaged, or a tensor is missing, or of another shape or dtype.
    """
    return _checked(folder, config)[1].infos


def _checked(folder: Path, config: Config) -> tuple[LanguageModel, StoredTensors]:
    """A whole model with lazy random weights, which take no memory, and the stored tensors that it needs."""
    tensors = stored_tensors(folder, config)
    whole = empty_model(config, tensors.infos)
    tensors = tensors.shaped(whole)
    wanted = check_tensors(whole, tensors.infos)
    return whole, replace(tensors, model={name: tensors.model[name] for name in tensors.model if name in wanted})


def empty_share(whole: LanguageModel, holding: Holding, share: Share) -> CausalLM:
    """The model of a rank's share, with lazy random weights; `whole` loses what others hold."""
    if share.parallel == "pipeline":
        assert isinstance(whole, CausalLM)
        keep_blocks(whole, deal_blocks(holding.config, holding.infos, share.size)[share.rank], share.rank)
        return whole
    infos = {name: piece.of(holding.infos[piece.name]) for name, piece in holding.pieces.items()}
    model = empty_model(share_config(holding.config, share, holding.infos), infos)
    assert isinstance(model, CausalLM)
    return model


def share_adapter(model: LanguageModel, path: Path) -> Adapter:
    """The part of an adapter that goes on a rank's share, by `put_adapter` or by name.

    Args:
        model: from `load_share`.
        path: as for `read_adapter`.

    Raises:
        ConfigError, CheckpointError, RequestError: as `load_adapter`, for the whole model.
    """
    holding: Holding = model.holding
    adapter = read_adapter(path)
    check_fit(empty_model(holding.config, holding.infos), adapter)
    return adapter_part(adapter, holding)


def _read(stored: Stored, piece: Piece, later: bool) -> mx.array:
    """A part of a tensor; one that is read at its first use is always whole."""
    info = piece.of(stored.info)
    if later:
        return mx.load(str(stored.path))[stored.name].reshape(info.shape)
    found = mx.array(memoryview(read_part(stored, piece.axis, piece.ranges)), mx.uint8)
    return found.view(mlx_dtype(info.dtype)).reshape(info.shape)

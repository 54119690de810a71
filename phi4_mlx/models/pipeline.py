"""Pipeline parallel: each rank runs some of the blocks, and hands its hidden states to the next rank.

Rank 0 has the embedding, the first blocks, the last norm and the head, so that it alone makes logits. Between two
ranks one array crosses for each forward pass: [B, T, D], and [B, rows, D] from the last rank back to rank 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.files.safetensors import TensorInfo, tensor_bytes
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.causal_lm import CausalLM
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.share import Piece, Pieces, Share

BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def deal_blocks(infos: Mapping[str, TensorInfo], size: int) -> list[range]:
    """The blocks of each rank: consecutive ones, so that the rank with the most bytes has as few as possible.

    Args:
        infos: the tensors of the whole model; those outside the blocks are rank 0's.
        size: the number of ranks, at most the number of blocks.
    """
    sizes: dict[int, int] = {}
    outside = 0
    for name, info in infos.items():
        nbytes = tensor_bytes(info.dtype, info.shape)
        if found := BLOCK.match(name):
            sizes[int(found[1])] = sizes.get(int(found[1]), 0) + nbytes
        else:
            outside += nbytes
    sums = [*accumulate((sizes[number] for number in sorted(sizes)), initial=0)]
    count = len(sizes)
    # best[end]: (most bytes of a rank, the ends of the ranks) where the ranks so far hold the blocks before `end`.
    best = {end: (outside + sums[end], [end]) for end in range(1, count + 1)}
    for _ in range(1, size):
        best = {
            end: min(
                (max(most, sums[end] - sums[start]), [*ends, end])
                for start, (most, ends) in best.items()
                if start < end
            )
            for end in range(min(best) + 1, count + 1)
        }
    _, ends = best[count]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def pieces_of(infos: Mapping[str, TensorInfo], share: Share) -> Pieces:
    """The tensors of one rank by their names in its share, whose blocks count from 0."""
    blocks = deal_blocks(infos, share.size)[share.rank]
    found = {}
    for name in infos:
        if (block := BLOCK.match(name)) is None:
            if share.rank == 0:
                found[name] = Piece(name)
        elif int(block[1]) in blocks:
            found[f"model.layers.{int(block[1]) - blocks.start}.{block[2]}"] = Piece(name)
    return found


class Stage(CausalLM):
    """The part of a model that one rank runs; see `as_stage`, which makes it of a model with this rank's blocks.

    `hidden` takes part in the pass of all ranks. On rank 0 its result is the whole model's; on others it is what they
    handed on, and their `logits` do not exist.
    """

    _group: mx.distributed.Group
    _last_norm: nn.Module

    @property
    def dtype(self) -> mx.Dtype:
        """See `LanguageModel.dtype`."""
        dtype: mx.Dtype = self.layers[0].input_layernorm.weight.dtype
        return dtype

    def hidden(
        self,
        ids: mx.array,
        cache: PromptCache | BatchCache | None = None,
        *,
        embeddings: mx.array | None = None,
        segments: mx.array | None = None,
        rows: int | None = None,
    ) -> mx.array:
        """See `LanguageModel.hidden`; with `rows`, only the last rank drops the others."""
        rank, size = self._group.rank(), self._group.size()
        (B, T), D = ids.shape, self.config.hidden_size
        if rank:
            embeddings = mx.distributed.recv((B, T, D), self.dtype, rank - 1, group=self._group)
        own = rows if rank == size - 1 else None
        x = super().hidden(ids, cache, embeddings=embeddings, segments=segments, rows=own)
        sent = mx.distributed.send(x, (rank + 1) % size, group=self._group)
        mx.async_eval(sent)  # before the result is waited for: nothing else orders the two
        if rank:
            return sent
        x = mx.distributed.recv((B, min(T, rows or T), D), self.dtype, size - 1, group=self._group)
        return self._last_norm(x)


def as_stage(model: CausalLM, share: Share, group: mx.distributed.Group) -> None:
    """Makes a model with the blocks of one rank, and its weights, one stage of the whole model."""
    decoder: Any = model.model
    model._last_norm, decoder.norm = decoder.norm, nn.Identity()
    model._group = group
    model.__class__ = type(f"{type(model).__name__}Stage", (Stage, type(model)), {})


def without_ends(model: CausalLM, share: Share) -> None:
    """Removes what only rank 0 has from the model of another rank."""
    if share.rank:
        model.model.embed_tokens = model.model.norm = nn.Identity()
        model.pop("lm_head", None)

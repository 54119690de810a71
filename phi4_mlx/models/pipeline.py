"""Pipeline parallel: each rank runs some of the blocks, and hands its hidden states to the next rank.

Rank 0 has the embedding, the first blocks, the last norm and the head, so that it alone makes logits. Between two
ranks one array crosses for each forward pass: [B, T, D], and [B, rows, D] from the last rank back to rank 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.adapters.named import NamedAdapters
from phi4_mlx.config.fields import Config
from phi4_mlx.config.sambay import SambaYConfig
from phi4_mlx.files.dtypes import FLOATS, mlx_dtype
from phi4_mlx.files.safetensors import TensorInfo, tensor_bytes
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.causal_lm import CausalLM
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.safe import safe
from phi4_mlx.models.share import Holding, Piece, Pieces, Share

BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def last_start(config: Config) -> int:
    """The last block with which a rank may begin: a SambaY decoder's later blocks share results, on one rank."""
    blocks = config.num_hidden_layers
    return blocks // 2 if isinstance(config, SambaYConfig) else blocks - 1


def deal_blocks(config: Config, infos: Mapping[str, TensorInfo], size: int) -> list[range]:
    """The blocks of each rank: consecutive ones, so that the fullest rank has few bytes, and the others are alike.

    Args:
        config: the whole model's.
        infos: its tensors; those outside the blocks are rank 0's.
        size: the number of ranks.
    """
    sizes, outside = [0] * config.num_hidden_layers, 0
    for name, info in infos.items():
        if found := BLOCK.match(name):
            sizes[int(found[1])] += tensor_bytes(info.dtype, info.shape)
        else:
            outside += tensor_bytes(info.dtype, info.shape)
    sums, starts = [*accumulate(sizes, initial=0)], range(1, last_start(config) + 1)
    total = outside + sums[-1]

    def cost(nbytes: int) -> float:
        return math.pow(nbytes / total, 16)  # in a sum, the largest one outweighs all others

    # dealt[end]: the least cost, and where the ranks end, if those so far hold the blocks before `end`.
    dealt = {end: (cost(outside + sums[end]), [end]) for end in [*starts, len(sizes)]}
    for _ in range(1, size):
        dealt = {
            end: min(
                (spent + cost(sums[end] - sums[start]), [*ends, end])
                for start, (spent, ends) in dealt.items()
                if start < end and start in starts
            )
            for end in [*dealt][1:]
        }
    ends = dealt[len(sizes)][1]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def pieces_of(config: Config, infos: Mapping[str, TensorInfo], share: Share) -> Pieces:
    """The tensors of one rank by their names in its share, whose blocks count from 0."""
    blocks = deal_blocks(config, infos, share.size)[share.rank]
    found = {}
    for name in infos:
        if (block := BLOCK.match(name)) is None:
            if share.rank == 0:
                found[name] = Piece(name)
        elif int(block[1]) in blocks:
            found[f"model.layers.{int(block[1]) - blocks.start}.{block[2]}"] = Piece(name)
    return found


def widest_dtype(infos: Mapping[str, TensorInfo]) -> mx.Dtype:
    """A dtype that has the numbers of all blocks, whose tensors may differ in theirs."""
    found = {info.dtype for name, info in infos.items() if BLOCK.match(name) and info.dtype in FLOATS}
    return mlx_dtype(found.pop()) if len(found) == 1 else mx.float32


ENDS = {"embed_tokens", "embed_tokens_extend", "norm", "final_layernorm"}
"""The parts of a decoder outside its blocks, which rank 0 has."""


class Stage(CausalLM):
    """The part of a model that one rank runs; see `as_stage`, which makes it of a model with this rank's blocks.

    `hidden` takes part in the pass of all ranks. On rank 0 its result is the whole model's; on others it is what they
    handed on, and there are no logits.

    Attributes:
        first: the number of this rank's first block in the whole model.
        holding: what the ranks share.
    """

    first: int
    holding: Holding
    _group: mx.distributed.Group
    _widest: mx.Dtype

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
        """See `LanguageModel.hidden`; ranks take no packed samples."""
        assert segments is None
        rank, size, (B, T) = self._group.rank(), self._group.size(), ids.shape
        if rank:
            shape = (B, T, self.config.hidden_size)
            embeddings = mx.distributed.recv(shape, self.stream_dtype, rank - 1, group=self._group)
        x = self.run_blocks(ids, cache, embeddings, rows if rank == size - 1 else None)
        sent = mx.distributed.send(x.astype(self.stream_dtype), (rank + 1) % size, group=self._group)
        mx.async_eval(sent)  # before the result is waited for: nothing else orders the two
        if rank:
            return sent
        shape = (B, min(T, rows or T), self.config.hidden_size)
        x = mx.distributed.recv(shape, self.stream_dtype, size - 1, group=self._group)
        mx.async_eval(x)  # also where the caller drops it: it would be taken for the next one
        return self.last_norm.applied(x)

    @property
    def stream_dtype(self) -> mx.Dtype:
        """The dtype of the hidden states between blocks, the same on all ranks."""
        return self._widest

    def run_blocks(
        self, ids: mx.array, cache: PromptCache | BatchCache | None, embeddings: mx.array | None, rows: int | None
    ) -> mx.array:
        """Hidden states [B, rows or T, D] after this rank's blocks, of ids [B, T] or their states before the blocks."""
        return super().hidden(ids, cache, embeddings=embeddings, rows=rows)

    @property
    def last_norm(self) -> Later:
        """The norm before the head, on rank 0."""
        norm: Later = self.model.norm
        return norm

    @staticmethod
    def config_of(config: Any, blocks: int) -> Any:
        """The whole model's config for a rank of so many blocks, of which the cost of a context follows."""
        return replace(config, num_hidden_layers=blocks)


class Later(nn.Module):
    """A norm that the decoder passes by, to be applied to what the last rank returns."""

    traceable = True

    def __call__(self, x: mx.array) -> mx.array:
        return x

    def applied(self, x: mx.array) -> mx.array:
        """The norm of x."""
        normed: mx.array = super().__call__(x)
        return normed


def as_stage(
    model: CausalLM, kind: Any, dealt: Sequence[range], rank: int, group: mx.distributed.Group
) -> None:
    """Makes a model of one rank's blocks, and its weights, one stage of the whole model.

    Args:
        model: from `keep_blocks`, with its `holding`.
        kind: the class of its stages.
        dealt: the blocks of each rank.
        rank: this one.
        group: all ranks.
    """
    model.__class__ = type(f"{type(model).__name__}Stage", (kind, type(model)), {})
    assert isinstance(model, Stage)
    model.first, model._group = dealt[rank].start, group
    model._widest = widest_dtype(model.holding.infos)
    # Rank 0 plans the memory of all: a context costs as much as on the rank with the most blocks.
    model.config = kind.config_of(model.config, max(map(len, dealt)))
    if rank == 0:
        norm: Any = model.last_norm
        norm.__class__ = type(f"Later{type(norm).__name__}", (Later, type(norm)), {})


def keep_blocks(model: CausalLM, blocks: range, rank: int) -> None:
    """Removes the blocks of other ranks from a whole model, and on other ranks what only rank 0 has."""
    decoder: Any = model.model
    decoder.layers = decoder.layers[blocks.start : blocks.stop]
    model.adapters = NamedAdapters(decoder.layers, dequantized=safe("products"))
    if rank:
        for name in ENDS.intersection(decoder):
            decoder[name] = nn.Identity()
        model.pop("lm_head", None)

"""Tensor parallel: each rank has a part of every matrix, and partial results are added up over all ranks.

Attention is split by heads and the MLP by its width: queries, keys, values, gate and up by rows of their matrices, the
two matrices after them by columns. Each of those two gives a partial output, and one sum over the ranks completes it.
The embedding and the head are split by vocabulary. A pass has two sums a layer and one for the embedding; the logits
are gathered, or the likeliest of them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.config.text import ModelConfig
from phi4_mlx.errors import RequestError
from phi4_mlx.files.safetensors import TensorInfo
from phi4_mlx.models import text
from phi4_mlx.models.causal_lm import CausalLM
from phi4_mlx.models.share import Piece, Pieces, Share, part_of
from phi4_mlx.models.split_logits import LEAST, Logits, SplitLogits, top

VOCABULARY_UNIT = 8  # rows; Metal's fastest product with a quantised matrix takes multiples of 8
BY_COLUMNS = ("self_attn.o_proj", "mlp.down_proj")
"""The linear layers whose inputs are split; their outputs are parts of a sum."""

_TENSOR = re.compile(r"(?:model\.layers\.\d+\.)?(.+)\.(?:weight|scales|biases)")
_WAY_OUT = "use --parallel pipeline"


def check_split(config: Any, size: int, infos: Mapping[str, TensorInfo] | None) -> None:
    """Raises RequestError, by name, if tensor parallel cannot split a model for so many ranks."""
    if type(config) is not ModelConfig:
        raise RequestError(
            f"tensor parallel is for decoders of model_type phi3, and this one is {config.model_type}; {_WAY_OUT}"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (count := getattr(config, name)) % size:
            raise RequestError(
                f"tensor parallel over {size} ranks needs {name} to be a multiple of {size}, and this model has "
                f"{count}; {_WAY_OUT}"
            )
    if (units := -(-config.vocab_size // VOCABULARY_UNIT)) < size:
        raise RequestError(
            f"tensor parallel deals the vocabulary in rows of {VOCABULARY_UNIT}, and its {config.vocab_size} ids make "
            f"{units}, fewer than {size} ranks; {_WAY_OUT}"
        )
    for name, info in (infos or {}).items():
        if name.endswith(".scales") and _key(name) in BY_COLUMNS and info.shape[1] % size:
            raise RequestError(
                f"tensor parallel over {size} ranks cuts {name.removesuffix('.scales')} between whole groups of its "
                f"quantisation, and it has {info.shape[1]} in a row; {_WAY_OUT}"
            )


def split_config(config: ModelConfig, share: Share) -> ModelConfig:
    """The shapes of one rank's share."""
    start, end = part_of(config.vocab_size, share.rank, share.size, VOCABULARY_UNIT)
    return ModelConfig(
        **{
            **vars(config),
            "num_attention_heads": config.num_attention_heads // share.size,
            "num_key_value_heads": config.num_key_value_heads // share.size,
            "intermediate_size": config.intermediate_size // share.size,
            "vocab_size": end - start,
        }
    )


def pieces_of(config: ModelConfig, infos: Mapping[str, TensorInfo], share: Share) -> Pieces:
    """The part of each tensor that one rank holds, by its name."""
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    vocabulary = (part_of(config.vocab_size, share.rank, share.size, VOCABULARY_UNIT),)
    rows = {
        "self_attn.qkv_proj": _each_part((queries, keys, keys), share),
        "mlp.gate_up_proj": _each_part((config.intermediate_size,) * 2, share),
        "model.embed_tokens": vocabulary,
        "lm_head": vocabulary,
    }
    found = {}
    for name, info in infos.items():
        if (key := _key(name)) in BY_COLUMNS:
            found[name] = Piece(name, 1, (part_of(info.shape[1], share.rank, share.size),))
        else:
            found[name] = Piece(name, 0, rows.get(key))
    return found


def _each_part(widths: tuple[int, ...], share: Share) -> tuple[tuple[int, int], ...]:
    """The range of one rank in each of the matrices that are joined in one."""
    found, start = [], 0
    for width in widths:
        own = part_of(width, share.rank, share.size)
        found.append((start + own[0], start + own[1]))
        start += width
    return tuple(found)


def _key(name: str) -> str:
    """The module of a tensor, by its path in a block where it is in one."""
    found = _TENSOR.fullmatch(name)
    return found[1] if found else ""


class SplitAttention(text.Attention):
    """Attention over the heads of one rank; the output is that of all heads."""

    _group: mx.distributed.Group

    def output(self, attended: mx.array) -> mx.array:
        """See `Attention.output`."""
        return mx.distributed.all_sum(super().output(attended), group=self._group)


class SplitMLP(text.MLP):
    """An MLP of one rank's width; the output is that of the whole width."""

    _group: mx.distributed.Group

    def __call__(self, x: mx.array) -> mx.array:
        return mx.distributed.all_sum(super().__call__(x), group=self._group)


class SplitEmbedding(nn.Module):
    """One rank's rows of an embedding: tokens of other ranks are zero, and the ranks are added up."""

    traceable = True
    _group: mx.distributed.Group
    first: int

    def __call__(self, ids: mx.array) -> mx.array:
        own = ids - self.first
        inside = (own >= 0) & (own < self.weight.shape[0])
        rows = super().__call__(mx.where(inside, own, 0))
        return mx.distributed.all_sum(mx.where(inside[..., None], rows, 0), group=self._group)


class TensorParallel(CausalLM):
    """A model of which every rank has a part of each matrix; see `as_part`, which makes it of a model of such parts.

    All ranks call `hidden`, `logits` and `candidates` with the same arguments, and have the same results.
    """

    _group: mx.distributed.Group

    def logits(self, hidden: mx.array) -> mx.array:
        """See `LanguageModel.logits`. All ranks' parts are gathered; a draw needs only `candidates`."""
        local = super().logits(hidden)
        widths = [end - start for start, end in self._parts]
        width = max(widths)
        padded = mx.pad(local, [*[(0, 0)] * (local.ndim - 1), (0, width - local.shape[-1])])
        gathered = mx.distributed.all_gather(padded[None], group=self._group)  # [size, ..., width]
        return mx.concatenate([part[..., :own] for part, own in zip(gathered, widths, strict=True)], axis=-1)

    def candidates(self, hidden: mx.array, count: int = LEAST, temps: Sequence[float] = ()) -> Logits:
        """See `LanguageModel.candidates`: the likeliest logits of each rank are gathered."""
        parts = self._parts
        count = min(count, *(end - start for start, end in parts))
        local = super().logits(hidden.reshape(-1, hidden.shape[-1])).astype(mx.float32)  # [n, V of this rank]
        own = top(local, count, parts[self._group.rank()][0], temps)
        gathered = mx.distributed.all_gather(own[None], group=self._group)  # [size, n, 2 count + 2]
        return SplitLogits.of(self, hidden, gathered, temps, parts)

    @property
    def _parts(self) -> list[tuple[int, int]]:
        """The ids of each rank."""
        V, size = self.config.vocab_size, self._group.size()
        return [part_of(V, rank, size, VOCABULARY_UNIT) for rank in range(size)]


class SplitDenseEmbedding(SplitEmbedding, nn.Embedding):
    """A dense one."""


class SplitQuantizedEmbedding(SplitEmbedding, nn.QuantizedEmbedding):
    """A quantised one."""


def as_part(model: CausalLM, config: ModelConfig, share: Share, group: mx.distributed.Group) -> None:
    """Makes a model of one rank's matrices work together with those of the other ranks.

    Args:
        model: of `split_config`, with its weights.
        config: of the whole model.
        share: the place of this rank.
        group: all ranks.
    """
    for layer in model.layers:
        for module, kind in ((layer.self_attn, SplitAttention), (layer.mlp, SplitMLP)):
            module.__class__, module._group = kind, group
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.add_up = functools.partial(mx.distributed.all_sum, group=group)
    embedding = model.model.embed_tokens
    kind = SplitQuantizedEmbedding if isinstance(embedding, nn.QuantizedEmbedding) else SplitDenseEmbedding
    embedding.__class__, embedding._group = kind, group
    embedding.first = part_of(config.vocab_size, share.rank, share.size, VOCABULARY_UNIT)[0]
    shapes = {**vars(model.config), "vocab_size": config.vocab_size}
    model.config, model._group = ModelConfig(**shapes), group
    model.__class__ = type(f"{type(model).__name__}Part", (TensorParallel, type(model)), {})

"""A model split over ranks: the bytes of each rank, what a context costs it, and the exchanges of a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from phi4_mlx.checkpoint_share import empty_share
from phi4_mlx.commands.sizing.shape import Shape
from phi4_mlx.generation.memory import ContextPlan
from phi4_mlx.models.cache import CacheOptions
from phi4_mlx.models.model import ContextCost, LanguageModel
from phi4_mlx.models.pipeline import Stage
from phi4_mlx.models.sharding import check_share, join_ranks, share_pieces, share_plan
from phi4_mlx.models.share import Holding, Parallel, Share
from phi4_mlx.models.split_logits import LEAST


@dataclass(frozen=True)
class Exchanges:
    """What crosses between ranks in one pass.

    Attributes:
        count: exchanges, one after another.
        nbytes: payload of all of them.
        words: the exchanges by kind.
    """

    count: int
    nbytes: int
    words: str


@dataclass(frozen=True)
class Split:
    """A model over several ranks.

    Attributes:
        parallel: the way.
        weights_bytes: that each rank reads and holds.
        costs: of a context, for each rank.
        layers: of the whole model.
        width: bytes of one hidden state between blocks.
        longest: the most tokens of the model's context.
    """

    parallel: Parallel
    weights_bytes: tuple[int, ...]
    costs: tuple[ContextCost, ...]
    layers: int
    width: int
    longest: int

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.weights_bytes)

    def exchanges(self, tokens: int, rows: int = 1) -> Exchanges:
        """What crosses between ranks in a pass.

        Args:
            tokens: that the pass runs, all sequences together.
            rows: sequences, of which each draws its next token.
        """
        if self.parallel == "pipeline":
            handed = ((self.size - 1) * tokens + rows) * self.width  # the last rank returns the drawn rows alone
            return Exchanges(self.size, handed, f"{self.size} hand-overs")
        states = tokens * self.width
        gather = self.size * rows * 4 * (2 * LEAST + 2)  # values, ids and two sums, 4 bytes each
        sums = 2 * self.layers + 1
        return Exchanges(sums + 1, sums * states + gather, f"{sums} sums and 1 gather")

    def most_tokens(self, limit_bytes: int) -> int:
        """The longest context where each rank may use so many bytes; 0 if a rank's weights alone exceed them."""
        plans = (
            ContextPlan(nbytes, cost, self.longest, self.longest, limit_bytes)
            for nbytes, cost in zip(self.weights_bytes, self.costs, strict=True)
        )
        return min(plan.most_tokens for plan in plans)


def split_of(shape: Shape, parallel: Parallel, size: int, kv_bits: int | None = None) -> Split:
    """Splits a model.

    Args:
        shape: of the model.
        parallel: the way.
        size: the number of ranks.
        kv_bits: of the cache.

    Raises:
        RequestError: the model cannot be split so.
    """
    check_share(shape.config, parallel, size, shape.infos)
    costs, dtype = [], shape.dtype
    for rank in range(size):
        share = Share(parallel, rank, size)
        holding = Holding(shape.config, shape.infos, share_pieces(shape.config, share, shape.infos))
        model = empty_share(shape.model(), holding, share)
        model.set_dtype(shape.dtype)
        group: Any = None  # the model never runs
        join_ranks(model, holding, share, group)
        if isinstance(model, Stage):  # its config is that of the rank with the most blocks
            model.config = model.config_of(shape.config, len(model.layers))
            dtype = model.stream_dtype
        costs.append(_cost(model, kv_bits))

    return Split(
        parallel,
        tuple(share_plan(shape.config, shape.infos, parallel, size)),
        tuple(costs),
        shape.config.num_hidden_layers,
        shape.config.hidden_size * dtype.size,
        shape.config.max_position_embeddings,
    )


def whole(shape: Shape, kv_bits: int | None = None) -> Split:
    """The model on one machine.

    Raises:
        RequestError: the model cannot keep such a cache.
    """
    model = shape.model()
    model.layer_caches(CacheOptions(None, kv_bits))
    return Split(
        "pipeline",
        (shape.weights_bytes,),
        (_cost(model, kv_bits),),
        shape.config.num_hidden_layers,
        shape.config.hidden_size * shape.dtype.size,
        shape.config.max_position_embeddings,
    )


def _cost(model: LanguageModel, kv_bits: int | None) -> ContextCost:
    """The cost of a context, the same on every machine: on a GPU some models need less."""
    with mx.stream(mx.cpu):
        return model.context_cost(kv_bits)

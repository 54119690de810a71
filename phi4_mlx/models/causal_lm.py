"""The part of the contract that decoders with one head share: a decoder `model`, and `lm_head` unless it is tied."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phi4_mlx.adapters.named import NamedAdapters
from phi4_mlx.config.fields import Config
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.safe import safe

Carried = tuple[mx.array, ...]
"""The values that one block passes to the next: hidden states [B, T, D], and results that later blocks share."""


class CausalLM(LanguageModel):
    """A decoder with its head. Attribute names are those of the family's checkpoints.

    Args:
        config: the model's shapes.
        decoder: everything below the head, with `embed_tokens`, `layers` and the three methods that run block by block;
            called as `hidden` calls it.
    """

    model: Any
    adapters: NamedAdapters

    def __init__(self, config: Config, decoder: nn.Module):
        super().__init__()
        self.config = config
        self.model = decoder
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute = False
        self.adapters = NamedAdapters(decoder.layers, dequantized=safe("products"))

    def hidden(
        self,
        ids: mx.array,
        cache: PromptCache | BatchCache | None = None,
        *,
        embeddings: mx.array | None = None,
        segments: mx.array | None = None,
        rows: int | None = None,
    ) -> mx.array:
        """See `LanguageModel.hidden`."""
        recompute = self.recompute and self.training and not safe("recompute")
        adapted = None if cache is None else self.adapters.select(cache.adapters)
        found: mx.array = self.model(
            ids, cache, embeddings=embeddings, segments=segments, rows=rows, recompute=recompute, watch=self.watch,
            adapted=adapted,
        )  # fmt: skip
        return found

    def logits(self, hidden: mx.array) -> mx.array:
        """See `LanguageModel.logits`."""
        head = self.model.embed_tokens.as_linear if self.config.tie_word_embeddings else self.lm_head
        logits: mx.array = head(hidden)
        return logits

    @property
    def head(self) -> nn.Module:
        """See `LanguageModel.head`."""
        head: nn.Module = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks; mlx-lm's name."""
        return list(self.model.layers)

    def into_blocks(self, embeddings: mx.array) -> Carried:
        """The input of the first block, of embeddings [B, T, D] of whole sequences.

        With `through_block` and `out_of_blocks` it computes `hidden` without a cache, so that a model whose weights do
        not fit in memory runs block by block.
        """
        carried: Carried = self.model.into_blocks(embeddings)
        return carried

    def through_block(self, number: int, carried: Carried) -> Carried:
        """The output of a block, counted from 0, and so the input of the next."""
        carried = self.model.through_block(number, carried)
        return carried

    def out_of_blocks(self, carried: Carried) -> mx.array:
        """Hidden states after the last norm [B, T, D], of the last block's output."""
        hidden: mx.array = self.model.out_of_blocks(carried)
        return hidden

    @property
    def step_bytes(self) -> int:
        """See `LanguageModel.step_bytes`; an embedding beside the head is only looked up, and towers are not read."""
        embeddings = () if self.config.tie_word_embeddings else ("model.embed_tokens.",)
        arrays = tree_flatten(self.parameters())
        return sum(
            int(array.nbytes) for name, array in arrays if not (name.startswith(embeddings) or self.on_demand(name))
        )

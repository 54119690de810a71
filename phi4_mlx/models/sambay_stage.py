"""One rank's blocks of a SambaY decoder, in a pipeline.

Hidden states alone cross from rank to rank, because the last one has all blocks that share results with later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from phi4_mlx.config.sambay import SambaYConfig
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.cache import CacheOptions, LayerCache
from phi4_mlx.models.pipeline import Later, Stage
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.sambay import MambaBlock, MemoryBlock, SelfAttentionBlock


class SambaYStage(Stage):
    """The blocks of one rank."""

    config: SambaYConfig

    @property
    def last_norm(self) -> Later:
        """See `Stage.last_norm`."""
        norm: Later = self.model.final_layernorm
        return norm

    @property
    def stream_dtype(self) -> mx.Dtype:
        """See `Stage.stream_dtype`."""
        return mx.float32

    @staticmethod
    def config_of(config: Any, blocks: int) -> Any:
        """See `Stage.config_of`: blocks differ too much for their number to say what a context costs."""
        return config

    def layer_caches(self, options: CacheOptions) -> list[LayerCache]:
        """See `LanguageModel.layer_caches`: those of this rank's blocks."""
        self.model.num_cached = min(len(self.layers), self.config.num_hidden_layers // 2 + 2 - self.first)
        return super().layer_caches(options)  # type: ignore[safe-super]

    def run_blocks(
        self, ids: mx.array, cache: PromptCache | BatchCache | None, embeddings: mx.array | None, rows: int | None
    ) -> mx.array:
        """See `Stage.run_blocks`; steps are not compiled."""
        T, layers = ids.shape[1], list(self.layers)
        caches: Sequence[Any] = [None] * len(layers)
        mask = None
        if cache is not None:
            adapted = self.adapters.select(cache.adapters)
            cache.record(ids)
            found = cache.make_mask(T) if isinstance(cache, BatchCache) else None
            caches, mask = cache, found if isinstance(found, mx.array) else None  # a window masks by itself
            if adapted is not None:
                adapted.start()
                layers = adapted.layers
        x = (self.model.embed_tokens(ids) if embeddings is None else embeddings).astype(mx.float32)
        for number, layer in enumerate(layers):
            if isinstance(layer, MambaBlock):
                x, memory = layer(x, caches[number], None)
            elif isinstance(layer, SelfAttentionBlock):
                is_full = layer.attn.window is None
                x, keys, values = layer(x, caches[number], mask, rows if is_full else None)
                if is_full and rows is not None:
                    memory = memory[:, -rows:]
            else:
                x = layer(x, memory) if isinstance(layer, MemoryBlock) else layer(x, keys, values, mask)
        return x

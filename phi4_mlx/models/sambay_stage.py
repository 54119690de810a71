"""One rank's blocks of a SambaY decoder, in a pipeline.

In the first half, hidden states alone cross from rank to rank. Blocks of the second half also read the memory of the
wanted rows and the keys and values of the full attention: a rank that has blocks of the second half alone keeps a cache
of those too, so that only those of the new tokens cross.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from phi4_mlx.config.sambay import SambaYConfig
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.cache import CacheOptions, KVCache, LayerCache
from phi4_mlx.models.causal_lm import Carried
from phi4_mlx.models.pipeline import Crossing, Later, Stage
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.sambay import MambaBlock, MemoryBlock, SelfAttentionBlock


class SambaYStage(Stage):
    """The blocks of one rank; all `Stage`s of a model know the numbers of the blocks that share results."""

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

    @property
    def num_cached(self) -> int:
        """The first block of the second half, in the whole model."""
        return self.config.num_hidden_layers // 2 + 2

    def layer_caches(self, options: CacheOptions) -> list[LayerCache]:
        """See `LanguageModel.layer_caches`: those of this rank's blocks."""
        self.model.num_cached = max(0, min(len(self.layers), self.num_cached - self.first))
        caches = super().layer_caches(options)  # type: ignore[safe-super]
        return caches or [KVCache()]

    def crossing(self, number: int, B: int, T: int, rows: int | None) -> Crossing:
        """See `Stage.crossing`."""
        config, is_second = self.config, number >= self.num_cached
        wanted = min(T, rows or T) if is_second else T
        found: Crossing = (((B, wanted, config.hidden_size), self.stream_dtype),)
        if number >= self.num_cached - 1:
            found += (((B, wanted, config.mamba_width), self.dtype),)
        if is_second:
            K, Dh = config.num_key_value_heads, config.head_dim
            found += (((B, K, T, Dh), self.dtype), ((B, K // 2, T, 2 * Dh), self.dtype))
        return found

    def run_blocks(
        self, ids: mx.array, cache: PromptCache | BatchCache | None, given: Carried, rows: int | None
    ) -> Carried:
        """See `Stage.run_blocks`; steps are not compiled."""
        T, layers = ids.shape[1], list(self.layers)
        caches: Sequence[Any] = [None] * max(1, len(layers))
        mask = None
        if cache is not None:
            adapted = self.adapters.select(cache.adapters)
            cache.record(ids)
            found = cache.make_mask(T) if isinstance(cache, BatchCache) else None
            caches, mask = cache, found if isinstance(found, mx.array) else None  # of padded rows alone
            if adapted is not None:
                adapted.start()
                layers = adapted.layers
        x, memory, *new = (*(given or (self.model.embed_tokens(ids).astype(mx.float32),)), None, None, None)[:4]
        keys, values = new
        if self.first >= self.num_cached and caches[0] is not None:
            keys, values = caches[0].update_and_fetch(*new)
        for number, layer in enumerate(layers, self.first):
            own = caches[number - self.first] if number < self.num_cached else None
            if isinstance(layer, MambaBlock):
                x, memory = layer(x, own, None)
            elif isinstance(layer, SelfAttentionBlock):
                is_full = number == self.num_cached - 1
                x, keys, values = layer(x, own, mask, rows if is_full else None)
                if is_full:
                    new = [keys[:, :, -T:], values[:, :, -T:]]
                    memory = memory if rows is None else memory[:, -rows:]
            else:
                x = layer(x, memory) if isinstance(layer, MemoryBlock) else layer(x, keys, values, mask)
        return (x, memory, *new)[: len(self.crossing(self.first + len(layers), 1, 1, None))]

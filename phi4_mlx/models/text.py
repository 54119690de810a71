"""The decoder of Phi-4-mini, Phi-4-mini-reasoning, Phi-3.5-mini and Phi-4 (`model_type` phi3), whole, top to bottom.

A block is x + attention(norm(x)), then x + mlp(norm(x)). Queries, keys and values are one matrix, gate and up another;
nothing has a bias; the head may be the embedding. Attribute names are the checkpoint's own.

Shapes: B batch, T new tokens, S cached plus new, D hidden, H query heads, K key/value heads, Dh head dim, F MLP width,
V vocabulary.

Source: `modeling_phi3.py` in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.cache import KVCache, PromptCache
from phi4_mlx.config import ModelConfig
from phi4_mlx.models.rope import PackedRotation, Regime, Rope, Rotation


class Attention(nn.Module):
    """Grouped-query attention over a fused projection."""

    def __init__(self, config: ModelConfig, softmax_scale: float):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = softmax_scale
        width = self.num_heads * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width + 2 * self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def __call__(self, x: mx.array, rotation: Rotation | PackedRotation, mask: Any, cache: Any) -> mx.array:
        B, T, _ = x.shape
        H, K = self.num_heads, self.num_kv_heads
        heads = self.qkv_proj(x).reshape(B, T, H + 2 * K, self.head_dim).transpose(0, 2, 1, 3)
        heads, values = mx.split(heads, [H + K], axis=1)  # [B, H + K, T, Dh], [B, K, T, Dh]
        queries, keys = rotation(heads, H)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)  # [B, K, S, Dh]
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate) * up), gate before up in the fused projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)  # [B, T, F] each
        return self.down_proj(nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """One block."""

    def __init__(self, config: ModelConfig, softmax_scale: float):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, softmax_scale)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, rotation: Rotation | PackedRotation, mask: Any, cache: Any) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything under the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rope = Rope(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, self.rope.softmax_scale) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False  # in training: keeps each block's input alone, and runs the block again in backward

    def __call__(self, ids: mx.array, cache: Sequence[Any] | None = None, segments: mx.array | None = None) -> mx.array:
        """Hidden states of the new tokens, [B, T] -> [B, T, D], after the last norm.

        Without a cache, `segments` [B, T] lets a row hold several samples, by their number: none sees another, each
        begins at position zero and has the RoPE table of its own length.
        """
        T = ids.shape[1]
        layers: Sequence[Any] = [None] * len(self.layers)
        offset, mask = 0, None if T == 1 else "causal"
        regime: Regime = self.rope.regime(T)
        if cache is not None:
            layers = cache if isinstance(cache, PromptCache) else PromptCache(cache, self.rope.regime)
            ids = layers.remember(ids)  # the whole sequence, where it has just outgrown its RoPE table
            offset, regime, mask = layers.offset, layers.regime, layers.make_mask(ids.shape[1])

        x = self.embed_tokens(ids)
        rotation: Rotation | PackedRotation = self.rope.at(offset, regime, x.dtype)
        if segments is not None:
            rotation, mask = self.rope.packed(segments, x.dtype), _block_diagonal(segments)
        for layer, layer_cache in zip(self.layers, layers, strict=True):
            run = nn.utils.checkpoint(layer) if self.recompute and self.training else layer
            x = run(x, rotation, mask, layer_cache)
        return self.norm(x if x.shape[1] == T else x[:, -T:])


def _block_diagonal(segments: mx.array) -> mx.array:
    """Which keys [S] each token [T] of a packed row may look at: [B, 1, T, S]."""
    at = mx.arange(segments.shape[1])
    return ((segments[:, :, None] == segments[:, None, :]) & (at[:, None] >= at))[:, None]


class Model(nn.Module):
    """Ids in, logits out.

    `model(ids, cache)` is exact whatever the length: where the new tokens take a cached sequence past the LongRoPE
    boundary, the whole of it is run again under the long table (`PromptCache.admit`).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, ids: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """Logits of the next token at each position.

        Args:
            ids: token ids [B, T], any integer dtype, each below the vocabulary's size.
            cache: what `make_cache` returned, or a list of mlx-lm's `KVCache`; it is appended to.

        Returns:
            Logits [B, T, V], in the dtype of the embedding.

        Raises:
            RequestError: a list of foreign caches would cross the LongRoPE boundary.
        """
        return self.logits(self.model(ids, cache))

    def logits(self, hidden: mx.array) -> mx.array:
        """The head alone: hidden states [B, T, D] -> logits [B, T, V]."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def make_cache(self, regime: Regime | None = None) -> PromptCache:
        """An empty cache for one batch of sequences.

        Args:
            regime: "long" for a conversation that will outgrow the LongRoPE boundary anyway: never run again, but not
                exact below the boundary. The default picks the table by length, as the reference does.
        """
        return PromptCache([KVCache() for _ in self.layers], self.model.rope.regime, regime)

    @property
    def layers(self) -> list[DecoderLayer]:
        """The blocks; mlx-lm's name."""
        return self.model.layers

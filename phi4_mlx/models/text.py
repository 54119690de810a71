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

from phi4_mlx.config import ModelConfig
from phi4_mlx.errors import RequestError, check_whole
from phi4_mlx.models.attention import attention
from phi4_mlx.models.cache import KVCache, PromptCache
from phi4_mlx.models.compiled import CompiledSteps
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

    def heads(self, x: mx.array, rotation: Rotation | PackedRotation) -> tuple[mx.array, mx.array, mx.array]:
        """Queries [B, H, T, Dh], keys and values [B, K, T, Dh], the first two rotated."""
        H, K = self.num_heads, self.num_kv_heads
        heads = _part_heads(self.qkv_proj(x), self.head_dim)
        heads, values = mx.split(heads, [H + K], axis=1)  # [B, H + K, T, Dh], [B, K, T, Dh]
        return *rotation(heads, H), values

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, mask: Any, cache: Any) -> mx.array:
        """What each head saw, [B, H, T, Dh], in the new tokens and in those of the cache, which takes the new in."""
        if cache is None:
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask)
        keys, values = cache.update_and_fetch(keys, values)  # [B, K, S, Dh], or quantised
        return attention(queries, keys, values, self.scale, mask, getattr(cache, "bits", None))

    def output(self, attended: mx.array) -> mx.array:
        """The output projection, [B, H, T, Dh] -> [B, T, D]."""
        return self.o_proj(_join_heads(attended))


# With one token the numbers stand in the same order either way: no transposing there, in the operations that a decode
# step is made of.
def _part_heads(x: mx.array, head_dim: int) -> mx.array:
    """[B, T, N * Dh] -> [B, N, T, Dh]."""
    B, T, _ = x.shape
    return x.reshape(B, -1, 1, head_dim) if T == 1 else x.reshape(B, T, -1, head_dim).transpose(0, 2, 1, 3)


def _join_heads(x: mx.array) -> mx.array:
    """[B, N, T, Dh] -> [B, T, N * Dh]."""
    B, _, T, _ = x.shape
    return x.reshape(B, 1, -1) if T == 1 else x.transpose(0, 2, 1, 3).reshape(B, T, -1)


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

    def heads(self, x: mx.array, rotation: Rotation | PackedRotation) -> tuple[mx.array, mx.array, mx.array]:
        """What comes before the attention: queries, keys and values."""
        return self.self_attn.heads(self.input_layernorm(x), rotation)

    def rest(self, x: mx.array, attended: mx.array) -> mx.array:
        """What comes after it."""
        x = x + self.self_attn.output(attended)
        return x + self.mlp(self.post_attention_layernorm(x))

    def __call__(
        self, x: mx.array, rotation: Rotation | PackedRotation, mask: Any, cache: Any, rows: int | None = None
    ) -> mx.array:
        queries, keys, values = self.heads(x, rotation)
        if rows is not None:
            x, queries, mask = x[:, -rows:], queries[:, :, -rows:], mask if rows > 1 else None
        return self.rest(x, self.self_attn.attend(queries, keys, values, mask, cache))


class Decoder(nn.Module):
    """Everything under the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rope = Rope(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, self.rope.softmax_scale) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._compiled = CompiledSteps(self.rope)
        self.recompute = False  # in training: keeps each block's input alone, and runs the block again in backward

    def __call__(
        self,
        ids: mx.array,
        cache: Sequence[Any] | None = None,
        segments: mx.array | None = None,
        rows: int | None = None,
    ) -> mx.array:
        """Hidden states of the new tokens, [B, T] -> [B, T, D], after the last norm.

        With `rows`, those of the last so many alone, [B, rows, D], under the causal mask: the last block then makes
        keys and values of all tokens, and nothing else of the others.

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

        alone = ids.shape[1] == 1 and cache is not None and not self.training
        if alone and self._compiled.ready([self.embed_tokens, *self.layers, self.norm]):
            return self._compiled(ids, offset, regime, mask, layers)
        x = self.embed_tokens(ids)
        rotation: Rotation | PackedRotation = self.rope.at(offset, regime, x.dtype)
        if segments is not None:
            rotation, mask = self.rope.packed(segments, x.dtype), _block_diagonal(segments)
        wanted = [*[None] * (len(self.layers) - 1), rows]
        for layer, layer_cache, layer_rows in zip(self.layers, layers, wanted, strict=True):
            run = nn.utils.checkpoint(layer) if self.recompute and self.training else layer
            x = run(x, rotation, mask, layer_cache, layer_rows)
        T = T if rows is None else rows
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

    def make_cache(
        self, regime: Regime | None = None, kv_bits: int | None = None, max_kv_size: int | None = None
    ) -> PromptCache:
        """An empty cache for one batch of sequences.

        Args:
            regime: "long" for a conversation that will outgrow the LongRoPE boundary anyway: never run again, but not
                exact below the boundary. The default picks the table by length, as the reference does.
            kv_bits: 4 or 8 keeps keys and values quantised; see `KVCache`.
            max_kv_size: how many tokens may stay, at least 512; see `KVCache`.

        Raises:
            RequestError: a number is outside its range, or the heads cannot be quantised.
        """
        if regime not in (None, "short", "long"):
            raise RequestError(f"regime {regime!r} is not known; it must be short or long, or None to go by the length")
        if kv_bits is not None and (type(kv_bits) is not int or kv_bits not in (4, 8)):
            raise RequestError(f"kv_bits {kv_bits!r} is not known; it must be 4 or 8, or None for no quantisation")
        if kv_bits and self.config.head_dim % 32:
            raise RequestError(f"kv_bits needs heads of a multiple of 32 numbers, not {self.config.head_dim}")
        if max_kv_size is not None:
            check_whole("max_kv_size", max_kv_size, 2 * KVCache.STEP)
        caches = [KVCache(kv_bits, max_kv_size) for _ in self.layers]
        return PromptCache(caches, self.model.rope.regime, regime)

    @property
    def layers(self) -> list[DecoderLayer]:
        """The blocks; mlx-lm's name."""
        return self.model.layers

"""The decoder of Phi-4-mini, Phi-4-mini-reasoning, Phi-3.5-mini and Phi-4 (`model_type` phi3), top to bottom.

A block is x + attention(norm(x)), then x + mlp(norm(x)). Queries, keys and values are one matrix, gate and up another;
there are no biases; the head may be the embedding. Attribute names are the checkpoint's own.

Shapes: B batch, T new tokens, S cached plus new, D hidden, H query heads, K key/value heads, Dh head dim, F MLP width,
V vocabulary.

Source: `modeling_phi3.py` in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.adapters.named import Selection
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.errors import RequestError
from phi4_mlx.models.attention import BLOCK, PackedAttention, attention
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.cache import CacheOptions, KVCache, LayerCache, Mask, group_size
from phi4_mlx.models.causal_lm import Carried, CausalLM
from phi4_mlx.models.compiled import ALL, Call, CompiledSteps, Traced
from phi4_mlx.models.fused import RMSNorm, softmax_attention
from phi4_mlx.models.model import ContextCost
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.rope import PackedRotation, Regime, Rope, Rotation, regime_of

# Prefixes of the weights of a block that work before its attention, and after it.
BEFORE, AFTER = ("input_layernorm.", "self_attn.qkv_proj."), ("self_attn.o_proj.", "post_attention_layernorm.", "mlp.")


class Attention(nn.Module):
    """Grouped-query attention over a fused projection."""

    traceable = True

    def __init__(self, config: ModelConfig, softmax_scale: float):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = softmax_scale
        width = self.num_heads * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width + 2 * self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def heads(self, x: mx.array, rotation: Rotation | PackedRotation) -> tuple[mx.array, mx.array, mx.array]:
        """Queries [B, H, T, Dh], keys and values [B, K, T, Dh]; queries and keys are rotated."""
        H, K = self.num_heads, self.num_kv_heads
        heads = _split_heads(self.qkv_proj(x), self.head_dim)
        heads, values = mx.split(heads, [H + K], axis=1)  # [B, H + K, T, Dh], [B, K, T, Dh]
        return *rotation(heads, H), values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: Mask | PackedAttention,
        cache: KVCache | None,
    ) -> mx.array:
        """Attention [B, H, T, Dh] over the new tokens and the cached ones; the new ones are appended to the cache."""
        if isinstance(mask, PackedAttention):
            return mask(queries, keys, values, self.scale)
        if cache is None:
            return softmax_attention(queries, keys, values, self.scale, mask)
        keys, values = cache.update_and_fetch(keys, values)  # [B, K, S, Dh], or quantised
        return attention(queries, keys, values, self.scale, mask, getattr(cache, "bits", None))

    def output(self, attended: mx.array) -> mx.array:
        """The output projection, [B, H, T, Dh] -> [B, T, D]."""
        return self.o_proj(_join_heads(attended))


# A single token has the same memory layout either way, so decode steps skip the transpose.
def _split_heads(x: mx.array, head_dim: int) -> mx.array:
    """[B, T, N * Dh] -> [B, N, T, Dh]."""
    B, T, _ = x.shape
    return x.reshape(B, -1, 1, head_dim) if T == 1 else x.reshape(B, T, -1, head_dim).transpose(0, 2, 1, 3)


def _join_heads(x: mx.array) -> mx.array:
    """[B, N, T, Dh] -> [B, T, N * Dh]."""
    B, _, T, _ = x.shape
    return x.reshape(B, 1, -1) if T == 1 else x.transpose(0, 2, 1, 3).reshape(B, T, -1)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate) * up), gate before up in the fused projection."""

    traceable = True

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)  # [B, T, F] each
        return self.down_proj(nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """One block."""

    traceable = True

    def __init__(self, config: ModelConfig, softmax_scale: float):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, softmax_scale)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def heads(self, x: mx.array, rotation: Rotation | PackedRotation) -> tuple[mx.array, mx.array, mx.array]:
        """Everything before the attention: queries, keys and values."""
        return self.self_attn.heads(self.input_layernorm(x), rotation)

    def rest(self, x: mx.array, attended: mx.array) -> mx.array:
        """Everything after the attention."""
        x = x + self.self_attn.output(attended)
        return x + self.mlp(self.post_attention_layernorm(x))

    def __call__(
        self,
        x: mx.array,
        rotation: Rotation | PackedRotation,
        mask: Mask | PackedAttention,
        cache: KVCache | None,
        rows: int | None = None,
    ) -> mx.array:
        queries, keys, values = self.heads(x, rotation)
        if rows is not None:
            x, queries = x[:, -rows:], queries[:, :, -rows:]
            if isinstance(mask, mx.array):
                mask = mask[..., -rows:, :]
            elif rows == 1:
                mask = None
        return self.rest(x, self.self_attn.attend(queries, keys, values, mask, cache))


class Decoder(nn.Module):
    """Everything below the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rope = Rope(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, self.rope.softmax_scale) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._compiled = CompiledSteps()

    def __call__(
        self,
        ids: mx.array,
        cache: PromptCache | BatchCache | None = None,
        *,
        embeddings: mx.array | None = None,
        segments: mx.array | None = None,
        rows: int | None = None,
        recompute: bool = False,
        watch: Callable[[nn.Module, mx.array], object] | None = None,
        adapted: Selection | None = None,
    ) -> mx.array:
        """See `LanguageModel.hidden`. With `rows`, the last block computes only keys and values of the other tokens."""
        T = ids.shape[1]
        regime = regime_of(T, self.rope.boundary) if cache is None else cache.regime
        caches: Sequence[Any] = [None] * len(self.layers)
        position: int | mx.array = 0
        mask: Mask | PackedAttention = None if T == 1 else "causal"
        if cache is not None:
            cache.record(ids)
            caches, position, mask = cache, cache.positions, cache.make_mask(T)

        layers, steps = self._under(adapted), self._compiled.of(adapted)
        one_step = T == 1 and cache is not None and not self.training
        if one_step and steps.ready([self.embed_tokens, *layers, self.norm]):
            embed, given = (self.embed_tokens, ids) if embeddings is None else (nn.Identity(), embeddings)
            calls = steps.calls((regime, type(embed)), lambda: self._trace(embed, regime, adapted))
            return self._step(calls, layers, given, mx.array(position), mask, caches)
        if adapted is not None:
            adapted.start()
        (x,) = self.into_blocks(self.embed_tokens(ids) if embeddings is None else embeddings)
        rotation: Rotation | PackedRotation = self.rope.at(position, regime, x.dtype)
        if segments is not None:
            rotation, mask = self.rope.packed(segments, x.dtype), PackedAttention(segments)
        rows_of_layer = [*[None] * (len(self.layers) - 1), rows]
        for layer, layer_cache, layer_rows in zip(layers, caches, rows_of_layer, strict=True):
            run = nn.utils.checkpoint(layer) if recompute else layer
            x = run(x, rotation, mask, layer_cache, layer_rows)
            if watch is not None:
                watch(layer, x)
        return self.norm(x)

    def into_blocks(self, embeddings: mx.array) -> Carried:
        """See `CausalLM.into_blocks`."""
        return (embeddings.astype(self.layers[0].input_layernorm.weight.dtype),)  # rows in mxfp4 become bfloat16

    def through_block(self, number: int, carried: Carried) -> Carried:
        """See `CausalLM.through_block`."""
        (x,) = carried
        T = x.shape[1]
        rotation = self.rope.at(0, regime_of(T, self.rope.boundary), x.dtype)
        return (self.layers[number](x, rotation, None if T == 1 else "causal", None),)

    def out_of_blocks(self, carried: Carried) -> mx.array:
        """See `CausalLM.out_of_blocks`."""
        return self.norm(carried[0])

    def _under(self, adapted: Selection | None) -> list[Any]:
        return list(self.layers) if adapted is None else adapted.layers

    def _step(
        self, calls: list[Call], layers: list[Any], given: mx.array, offset: mx.array, mask: Any, caches: Sequence[Any]
    ) -> mx.array:
        """A step in compiled calls, from one attention to the next; ids [B, 1] or embeddings -> [B, 1, D]."""
        x, *heads = calls[0](given, offset)
        for layer, cache, call in zip(layers, caches, calls[1:], strict=True):
            queries, keys, values = heads
            x, *heads = call(x, layer.self_attn.attend(queries, keys, values, mask, cache), offset)
        return x

    def _trace(self, embed: nn.Module, regime: Regime, adapted: Selection | None) -> list[Call]:
        layers = self._under(adapted)

        def heads(layer: Any, x: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            return x, *layer.heads(x, self.rope.at(offset, regime, x.dtype))

        def first(embedding: Any, layer: Any, given: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            return heads(layer, embedding(given).astype(layer.input_layernorm.weight.dtype), offset)

        def between(layer: Any, following: Any, x: mx.array, seen: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            return heads(following, layer.rest(x, seen), offset)

        def last(layer: Any, norm: Any, x: mx.array, seen: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            return (norm(layer.rest(x, seen)),)

        inner = Traced(between, AFTER, BEFORE, adapted=adapted)
        return [
            Traced(first, ALL, BEFORE, adapted=adapted).on(embed, layers[0]),
            *(inner.on(*pair) for pair in pairwise(layers)),
            Traced(last, AFTER, ALL, adapted=adapted).on(layers[-1], self.norm),
        ]


class Model(CausalLM):
    """A phi3 decoder with its head."""

    config: ModelConfig
    model: Decoder
    lora_keys = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

    def __init__(self, config: ModelConfig):
        super().__init__(config, Decoder(config))
        self.boundary = self.model.rope.boundary

    @property
    def dtype(self) -> mx.Dtype:
        """See `LanguageModel.dtype`."""
        return self.model.norm.weight.dtype

    def layer_caches(self, options: CacheOptions) -> list[LayerCache]:
        """See `LanguageModel.layer_caches`."""
        if options.kv_bits and self.config.head_dim % 32:
            raise RequestError(f"kv_bits needs a head_dim that is a multiple of 32, not {self.config.head_dim}")
        return [KVCache(options.kv_bits, options.max_kv_size) for _ in self.layers]

    def context_cost(self, kv_bits: int | None = None) -> ContextCost:
        """See `LanguageModel.context_cost`."""
        config, itemsize = self.config, self.dtype.size
        head = config.head_dim * itemsize
        if kv_bits is not None:  # and a scale and a bias for each group
            head = config.head_dim * kv_bits // 8 + 2 * itemsize * config.head_dim // group_size(config.head_dim)
        layer_bytes = 2 * config.num_key_value_heads * head
        heads = config.num_attention_heads * config.head_dim
        width = heads + 2 * config.num_key_value_heads * config.head_dim
        activations = itemsize * (2 * config.hidden_size + max(3 * width, 3 * config.intermediate_size))
        if kv_bits is not None:  # in float32: queries, attention output, and two blocks of scores
            activations += 4 * (3 * heads + 2 * config.num_attention_heads * BLOCK)
        has_scores = kv_bits is None and mx.default_device() == mx.Device(mx.cpu)
        return ContextCost(
            token_bytes=config.num_hidden_layers * layer_bytes,
            layer_bytes=layer_bytes,
            fixed_bytes=0,
            activation_bytes=activations,
            score_bytes=itemsize * config.num_attention_heads if has_scores else 0,
        )

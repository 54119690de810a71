"""Phi-4-mini-flash-reasoning (`model_type` phi4flash): the SambaY decoder-hybrid-decoder, top to bottom.

The first half alternates Mamba-1 and differential attention in a sliding window. Two layers follow whose results the
second half shares: a Mamba layer whose scan output is its memory, and full attention whose keys and values it reads.
The second half alternates gated memory units and cross attention. It has no state of its own, so a prefill runs it for
the wanted rows alone. There is no positional encoding. Attribute names are the checkpoint's own.

Shapes: B batch, T new tokens, S cached plus new, D hidden, H query heads, K key/value heads, Dh head dim, P = K / 2
pairs of them, G = H / K queries a key, E inner width, N state size, R rank of dt.

Source: `modeling_phi4flash.py` of the checkpoint; ArchScale (arXiv 2507.06607); Differential Transformer (2410.05258).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.adapters.named import Selection
from phi4_mlx.config.sambay import SambaYConfig
from phi4_mlx.errors import RequestError
from phi4_mlx.models.attention import SLICE, PackedAttention
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.cache import REWIND, CacheOptions, KVCache, LayerCache
from phi4_mlx.models.causal_lm import Carried, CausalLM
from phi4_mlx.models.compiled import ALL, Call, CompiledSteps, Traced, compiled
from phi4_mlx.models.differential import SCORES, Attention, Mask
from phi4_mlx.models.fused import layer_norm
from phi4_mlx.models.model import ContextCost
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.scan import selective_scan, short_scan
from phi4_mlx.models.state import RecurrentCache, WindowCache

# Prefixes of a block's weights that are used before its attention, and after it.
BEFORE = ("input_layernorm.", "attn.Wqkv.", "attn.inner_cross_attn.lambda_", "attn.inner_cross_attn._initial")
AFTER = (
    "attn.inner_cross_attn.subln.", "attn.inner_cross_attn._initial", "attn.out_proj.", "post_attention_layernorm.",
    "mlp.",
)  # fmt: skip

STEPS = 1e-3, 1e-1  # the range of dt in a new model, as in Mamba
Arrays = tuple[mx.array, ...]


@partial(compiled, shapeless=True)
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x in float32, in the dtype of the gate."""
    return (nn.silu(gate.astype(mx.float32)) * x.astype(mx.float32)).astype(gate.dtype)


class LayerNorm(nn.LayerNorm):
    """The norm of the float32 residual stream, in the dtype of the weights."""

    traceable = True

    def __call__(self, x: mx.array) -> mx.array:
        return (layer_norm(x, None, None, self.eps) * self.weight + self.bias).astype(self.weight.dtype)


class Samples:
    """The borders of the samples packed in rows, so that no sample sees another.

    Args:
        segments: [B, T], the number of each token's sample.
        taps: taps of the convolution.
    """

    def __init__(self, segments: mx.array, taps: int):
        T = segments.shape[1]
        earlier = mx.pad(segments, [(0, 0), (taps - 1, 0)], constant_values=-1)
        self.same = mx.stack([earlier[:, k : k + T] == segments for k in range(taps)], axis=-1)  # [B, T, taps]
        before = mx.pad(segments[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
        self.keep = (before == segments).astype(mx.float32)  # 0 at the first token of a sample
        self.attention = PackedAttention(segments)


class Conv1d(nn.Module):
    """A causal depthwise convolution as a sum of shifted products, so that names and shapes stay the checkpoint's."""

    traceable = True

    def __init__(self, width: int, taps: int):
        super().__init__()
        bound = taps**-0.5
        self.weight = mx.random.uniform(-bound, bound, (width, 1, taps))
        self.bias = mx.random.uniform(-bound, bound, (width,))

    def __call__(self, inputs: mx.array, same: mx.array | None) -> mx.array:
        """[B, taps - 1 + T, E] -> [B, T, E]; `same` [B, T, taps] is false where a tap reaches into another sample."""
        taps = self.weight.shape[-1]
        T = inputs.shape[1] - (taps - 1)
        total = self.bias
        for k, weight in enumerate(mx.split(self.weight.T, taps)):  # [1, 1, E] each
            product = inputs[:, k : k + T] * weight
            total = total + (product if same is None else mx.where(same[:, :, k : k + 1], product, 0))
        return total


def step_bias(width: int, steps: tuple[float, float] = STEPS) -> mx.array:
    """Initial biases of dt [width], so that softplus gives step sizes within `steps`, uniform on a log scale."""
    dt = mx.exp(mx.random.uniform(*map(math.log, steps), (width,)))
    return dt + mx.log(-mx.expm1(-dt))  # the inverse of softplus


class Mamba(nn.Module):
    """A selective state-space layer (Mamba-1)."""

    traceable = True

    def __init__(self, config: SambaYConfig):
        super().__init__()
        D, E, N, R = config.hidden_size, config.mamba_width, config.mamba_d_state, config.mamba_dt_rank
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        self.conv1d = Conv1d(E, config.mamba_d_conv)
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, E)
        self.dt_proj.bias = step_bias(E)
        self.A_log = mx.broadcast_to(mx.log(mx.arange(1, N + 1, dtype=mx.float32)), (E, N))
        self.D = mx.ones((E,))
        self.out_proj = nn.Linear(E, D, bias=False)

    def __call__(
        self, x: mx.array, cache: RecurrentCache | None, samples: Samples | None
    ) -> tuple[mx.array, mx.array]:
        """The output [B, T, D] and the scan's output before the gate [B, T, E]; updates the cache."""
        tail, state = self.before(cache, x)
        mixed, y, inputs, states = self.mix(x, tail, state, samples)
        if cache is not None:
            cache.update(inputs, states)
        return mixed, y

    def before(self, cache: RecurrentCache | None, x: mx.array) -> list[mx.array]:
        """The convolution's inputs before x [B, taps - 1, E] and the state [B, N, E]: cached ones, or zeros."""
        if cache is not None and cache.offset:
            return cache.arrays
        (E, N), B = self.A_log.shape, len(x)
        return [mx.zeros((B, self.conv1d.weight.shape[-1] - 1, E), x.dtype), mx.zeros((B, N, E), mx.float32)]

    def mix(
        self, x: mx.array, tail: mx.array, state: mx.array, samples: Samples | None = None
    ) -> tuple[mx.array, mx.array, mx.array, list[mx.array]]:
        """The output [B, T, D], the scan's output [B, T, E], and the arguments of `RecurrentCache.update`."""
        N, T = self.A_log.shape[1], x.shape[1]
        u, z = mx.split(self.in_proj(x), 2, axis=-1)  # [B, T, E] each
        inputs = mx.concatenate([tail, u], axis=1)
        convolved = nn.silu(self.conv1d(inputs.astype(mx.float32), samples and samples.same))
        dt, weights, readout = mx.split(self.x_proj(convolved), [-2 * N, -N], axis=-1)  # R, N, N columns
        dt = nn.softplus(self.dt_proj(dt.astype(x.dtype)).astype(mx.float32))
        rates = -mx.exp(self.A_log.astype(mx.float32)).T
        if samples is None and T <= REWIND and not self.training:
            y, states = short_scan(convolved, dt, rates, weights, readout, state)
        else:
            y, state = selective_scan(convolved, dt, rates, weights, readout, state, samples and samples.keep)
            states = [state]
        y = y + self.D * convolved
        return self.out_proj(swiglu(z, y)), y.astype(x.dtype), inputs, states


class GatedMemory(nn.Module):
    """A gated memory unit: each token gates its own row of the memory, a Mamba layer's scan output."""

    traceable = True

    def __init__(self, config: SambaYConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, config.mamba_width, bias=False)
        self.out_proj = nn.Linear(config.mamba_width, config.hidden_size, bias=False)

    def __call__(self, x: mx.array, memory: mx.array) -> mx.array:
        return self.out_proj(swiglu(self.in_proj(x), memory))


class MLP(nn.Module):
    """SwiGLU: fc2(silu(gate) * up), gate before up in the fused projection."""

    traceable = True

    def __init__(self, config: SambaYConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.fc1(x), 2, axis=-1)  # [B, T, F] each
        return self.fc2(swiglu(gate, up))


class Block(nn.Module):
    """A mixer and an MLP with their norms; the residual stream is float32, as in the reference."""

    traceable = True

    def __init__(self, config: SambaYConfig, mixer: nn.Module):
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = mixer
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def rest(self, x: mx.array, mixed: mx.array) -> mx.array:
        """Everything after the mixer, whose output is `mixed` [B, T, D]."""
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x))


class MambaBlock(Block):
    """A block of the first half, or the one whose scan output is the memory of the second."""

    def __call__(
        self, x: mx.array, cache: RecurrentCache | None, samples: Samples | None
    ) -> tuple[mx.array, mx.array]:
        """The block's output [B, T, D], and the scan's [B, T, E]."""
        mixed, memory = self.attn(self.input_layernorm(x), cache, samples)
        return self.rest(x, mixed), memory


class SelfAttentionBlock(Block):
    """A block of the first half, or the one whose keys and values the second reads."""

    def __call__(
        self, x: mx.array, cache: WindowCache | KVCache | None, mask: Mask, rows: int | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The output of the last `rows` positions (None: all), and the keys and values that were attended to."""
        weight, queries, keys, values = self.attn.heads(self.input_layernorm(x))
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        if rows is not None:
            x, queries = x[:, -rows:], queries[:, -rows:]
        return self.rest(x, self.attn.output(self.attn.attend(weight, queries, keys, values, mask))), keys, values


class MemoryBlock(Block):
    """A block of the second half that reads the memory."""

    def __call__(self, x: mx.array, memory: mx.array) -> mx.array:
        return self.rest(x, self.attn(self.input_layernorm(x), memory))


class CrossBlock(Block):
    """A block of the second half that reads the keys and values of the full attention."""

    def __call__(self, x: mx.array, keys: mx.array, values: mx.array, mask: Mask) -> mx.array:
        weight, queries = self.attn.heads(self.input_layernorm(x))
        return self.rest(x, self.attn.output(self.attn.attend(weight, queries, keys, values, mask)))


class Decoder(nn.Module):
    """Everything below the head."""

    def __init__(self, config: SambaYConfig):
        super().__init__()
        half = config.num_hidden_layers // 2

        def block(i: int) -> Block:
            if i % 2 == 0:
                return MambaBlock(config, Mamba(config)) if i <= half else MemoryBlock(config, GatedMemory(config))
            window, cross = config.sliding_window if i < half else None, i > half + 1
            return (CrossBlock if cross else SelfAttentionBlock)(config, Attention(config, i, window, cross=cross))

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [block(i) for i in range(config.num_hidden_layers)]
        self.final_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.num_cached = half + 2  # the blocks from here on have no cache
        self._taps, self._compiled = config.mamba_d_conv, CompiledSteps()

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
        """See `LanguageModel.hidden`. Results that no later token reads are computed for the wanted rows alone."""
        T = ids.shape[1]
        caches: Sequence[Any] = [None] * self.num_cached
        mask: Mask = None
        if cache is not None:
            cache.record(ids)
            caches, mask = cache, cache.make_mask(T) if isinstance(cache, BatchCache) else None
        one_step = T == 1 and cache is not None and cache[0].offset and embeddings is None and not self.training
        layers, steps = self._under(adapted), self._compiled.of(adapted)
        if one_step and steps.ready([self.embed_tokens, *layers, self.final_layernorm]):
            return self._step(steps.calls(None, lambda: self._trace(adapted)), layers, ids, mask, caches)
        if adapted is not None:
            adapted.start()
        samples = None if segments is None else Samples(segments, self._taps)
        mask = mask if samples is None else samples.attention

        x = (self.embed_tokens(ids) if embeddings is None else embeddings).astype(mx.float32)
        for i, (layer, layer_cache) in enumerate(zip(layers, caches, strict=False)):
            run = nn.utils.checkpoint(layer) if recompute else layer
            if isinstance(layer, MambaBlock):
                x, memory = run(x, layer_cache, samples)
            else:
                x, keys, values = run(x, layer_cache, mask, rows if i == self.num_cached - 1 else None)
            if watch is not None:
                watch(layer, x)
        if rows is not None:
            memory = memory[:, -rows:]
        for layer in layers[self.num_cached :]:
            run = nn.utils.checkpoint(layer) if recompute else layer
            x = run(x, memory) if isinstance(layer, MemoryBlock) else run(x, keys, values, mask)
            if watch is not None:
                watch(layer, x)
        return self.final_layernorm(x)

    def into_blocks(self, embeddings: mx.array) -> Carried:
        """See `CausalLM.into_blocks`."""
        return (embeddings.astype(mx.float32),)

    def through_block(self, number: int, carried: Carried) -> Carried:
        """See `CausalLM.through_block`; the second half shares the memory, the keys and the values."""
        layer, (x, *shared) = self.layers[number], carried
        if isinstance(layer, MambaBlock):
            x, memory = layer(x, None, None)
            return (x, memory) if number == self.num_cached - 2 else (x,)
        if isinstance(layer, SelfAttentionBlock):
            x, *keys_and_values = layer(x, None, None, None)
            return (x, *shared, *keys_and_values) if number == self.num_cached - 1 else (x,)
        memory, *keys_and_values = shared
        x = layer(x, memory) if isinstance(layer, MemoryBlock) else layer(x, *keys_and_values, None)
        return (x, *shared)

    def out_of_blocks(self, carried: Carried) -> mx.array:
        """See `CausalLM.out_of_blocks`."""
        return self.final_layernorm(carried[0])

    def _under(self, adapted: Selection | None) -> list[Any]:
        return list(self.layers) if adapted is None else adapted.layers

    def _step(
        self, calls: list[Call], layers: list[Any], ids: mx.array, mask: mx.array | None, caches: Sequence[Any]
    ) -> mx.array:
        """A single-token step in compiled calls, from one attention to the next; ids [B, 1] -> [B, 1, D]."""
        x, memory, inputs, state, *heads = calls[0](ids, *caches[0].arrays)
        caches[0].update(inputs, [state])
        for i in range(1, self.num_cached, 2):
            weight, queries, *new = heads
            keys, values = caches[i].update_and_fetch(*new)
            mixed = layers[i].attn.attend(weight, queries, keys, values, mask)
            if i + 1 < self.num_cached:
                x, memory, inputs, state, *heads = calls[i // 2 + 1](x, mixed, *caches[i + 1].arrays)
                caches[i + 1].update(inputs, [state])
        for layer, call in zip(layers[self.num_cached + 1 :: 2], calls[self.num_cached // 2 :], strict=False):
            x, *heads = call(x, mixed, memory)
            mixed = layer.attn.attend(*heads, keys, values, mask)
        return calls[-1](x, mixed)[0]

    def _trace(self, adapted: Selection | None) -> list[Call]:
        """The calls of a step: up to the first attention, between each two, and after the last."""
        layers = self._under(adapted)

        def remember(mamba: MambaBlock, attention: Block, x: mx.array, tail: mx.array, state: mx.array) -> Arrays:
            mixed, memory, inputs, (state,) = mamba.attn.mix(mamba.input_layernorm(x), tail, state)
            x = mamba.rest(x, mixed)
            return x, memory, inputs, state, *attention.attn.heads(attention.input_layernorm(x))

        def first(embed: nn.Embedding, mamba: MambaBlock, attention: Block, ids: mx.array, *before: mx.array) -> Arrays:
            return remember(mamba, attention, embed(ids).astype(mx.float32), *before)

        def between(
            attention: Block, mamba: MambaBlock, following: Block, x: mx.array, mixed: mx.array, *before: mx.array
        ) -> Arrays:
            return remember(mamba, following, attention.rest(x, attention.attn.output(mixed)), *before)

        def gated(
            attention: Block, unit: MemoryBlock, following: Block, x: mx.array, mixed: mx.array, memory: mx.array
        ) -> Arrays:
            x = unit(attention.rest(x, attention.attn.output(mixed)), memory)
            return x, *following.attn.heads(following.input_layernorm(x))

        def last(attention: Block, norm: LayerNorm, x: mx.array, mixed: mx.array) -> Arrays:
            return (norm(attention.rest(x, attention.attn.output(mixed))),)

        remembering = Traced(between, AFTER, ALL, BEFORE, adapted=adapted)
        gating = Traced(gated, AFTER, ALL, BEFORE, adapted=adapted)
        triples = zip(layers[1::2], layers[2::2], layers[3::2], strict=False)
        return [
            Traced(first, ALL, ALL, BEFORE, adapted=adapted).on(self.embed_tokens, *layers[:2]),
            *((remembering if isinstance(triple[1], MambaBlock) else gating).on(*triple) for triple in triples),
            Traced(last, AFTER, ALL, adapted=adapted).on(layers[-1], self.final_layernorm),
        ]


class Model(CausalLM):
    """A SambaY decoder with its head."""

    config: SambaYConfig
    model: Decoder
    lora_keys = ("attn.in_proj", "attn.out_proj", "attn.Wqkv", "mlp.fc1", "mlp.fc2")

    def __init__(self, config: SambaYConfig):
        super().__init__(config, Decoder(config))

    @property
    def dtype(self) -> mx.Dtype:
        """See `LanguageModel.dtype`."""
        return self.model.final_layernorm.weight.dtype

    def quantizable(self, path: str, module: nn.Module) -> bool:
        """See `LanguageModel.quantizable`; x_proj and dt_proj are small, and the scan is sensitive to them."""
        return super().quantizable(path, module) and not path.endswith(("x_proj", "dt_proj"))

    def in_float32(self, name: str) -> bool:
        """See `LanguageModel.in_float32`: published so, because an exponential magnifies rounding errors."""
        return name.endswith(".A_log") or ".lambda_" in name

    def layer_caches(self, options: CacheOptions) -> list[LayerCache]:
        """See `LanguageModel.layer_caches`."""
        for name in ("kv_bits", "max_kv_size"):
            if getattr(options, name) is not None:
                raise RequestError(
                    f"{name} does not apply to this model: only one of its layers keeps keys and values of all tokens; "
                    f"leave out --{name.replace('_', '-')}"
                )
        caches: list[LayerCache] = []
        for layer in self.model.layers[: self.model.num_cached]:
            if isinstance(layer, MambaBlock):
                caches.append(RecurrentCache(self.config.mamba_d_conv))
            else:
                caches.append(WindowCache(layer.attn.window) if layer.attn.window else KVCache())
        return caches

    def context_cost(self, kv_bits: int | None = None) -> ContextCost:
        """See `LanguageModel.context_cost`."""
        config, itemsize = self.config, self.dtype.size
        E, half = config.mamba_width, config.num_hidden_layers // 2
        token_bytes = 2 * config.num_key_value_heads * config.head_dim * itemsize  # one layer's keys and values
        state_bytes = E * (4 * config.mamba_d_state + itemsize * (config.mamba_d_conv - 1))
        window_bytes = (config.sliding_window - 1 + WindowCache.STEP) * token_bytes
        mlp, scan = 3 * itemsize * config.intermediate_size, (6 * itemsize + 6 * 4) * E  # arrays alive at once
        return ContextCost(
            token_bytes=token_bytes,
            layer_bytes=token_bytes,
            fixed_bytes=(half // 2 + 1) * state_bytes + half // 2 * window_bytes,
            activation_bytes=2 * 4 * config.hidden_size + max(mlp, scan),
            score_bytes=4 * 4 * SCORES // SLICE,  # a slice: four float32 arrays of `SCORES`
            reads=half // 2,  # by the full attention, and by each cross-attention
        )

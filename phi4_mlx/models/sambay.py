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
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.models.cache import REWIND
from phi4_mlx.models.scan import selective_scan, short_scan
from phi4_mlx.models.state import RecurrentCache

SCORES = 2**22  # scores of all heads in one slice of queries


def difference(
    queries: mx.array, keys: mx.array, values: mx.array, weight: mx.array, window: int | None
) -> mx.array:
    """Causal differential attention, (softmax(q1 k1) - weight softmax(q2 k2)) v, in slices of queries.

    Args:
        queries: [B, 2, P, G, T, Dh], scaled; the last T positions.
        keys: [B, 2, P, S, Dh].
        values: [B, P, S, 2 Dh].
        weight: lambda, a scalar.
        window: a query sees itself and the window - 1 keys before it; None: all keys before it.

    Returns:
        [B, P, G, T, 2 Dh], in the dtype of the values.
    """
    B, _, P, G, T, _ = queries.shape
    S = keys.shape[3]
    step = max(1, SCORES // (2 * P * G * B * min(S, 2 * window if window else S)))
    if window is not None:
        step = max(step, 1) if step < window else window
    parts = []
    for start in range(0, T, step):
        stop = min(T, start + step)
        end = S - T + stop  # keys that the last query of the slice sees
        begin = 0 if window is None else max(0, S - T + start - (window - 1))
        rows = stop - start
        seen = keys[:, :, :, begin:end]
        scores = queries[:, :, :, :, start:stop].reshape(B, 2, P, G * rows, -1) @ seen.swapaxes(-1, -2)
        if rows > 1 or (window is not None and end - begin > window):
            at, key = mx.arange(end - rows, end)[:, None], mx.arange(begin, end)
            mask = key <= at if window is None else (key <= at) & (at - key < window)
            scores = mx.where(mask, scores.reshape(B, 2, P, G, rows, -1), -mx.inf).reshape(scores.shape)
        shares = mx.softmax(scores, axis=-1, precise=True)  # [B, 2, P, G * rows, keys]
        mixed = (shares[:, 0] - weight * shares[:, 1]).astype(values.dtype)
        parts.append((mixed @ values[:, :, begin:end]).reshape(B, P, G, rows, -1))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=3)


class Conv1d(nn.Module):
    """A causal depthwise convolution, as a sum of shifted products: the checkpoint's names and shapes."""

    def __init__(self, width: int, taps: int):
        super().__init__()
        self.weight, self.bias = mx.zeros((width, 1, taps)), mx.zeros((width,))

    def __call__(self, inputs: mx.array, same: mx.array | None) -> mx.array:
        """[B, taps - 1 + T, E] -> [B, T, E]; `same` [B, T, taps] is 0 where a tap reaches into another sample."""
        taps = self.weight.shape[-1]
        T = inputs.shape[1] - (taps - 1)
        total = self.bias
        for k in range(taps):
            product = inputs[:, k : k + T] * self.weight[:, 0, k]
            total = total + (product if same is None else product * same[:, :, k : k + 1])
        return total


class Mamba(nn.Module):
    """A selective state-space layer (Mamba-1)."""

    def __init__(self, config: Any):
        super().__init__()
        D, E, N, R = config.hidden_size, config.mamba_width, config.mamba_d_state, config.mamba_dt_rank
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        self.conv1d = Conv1d(E, config.mamba_d_conv)
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, E)
        self.A_log = mx.zeros((E, N))
        self.D = mx.ones((E,))
        self.out_proj = nn.Linear(E, D, bias=False)
        self._split = [R, R + N]

    def __call__(self, x: mx.array, cache: Any, samples: Any) -> tuple[mx.array, mx.array]:
        """The output [B, T, D], and the scan's output before the gate [B, T, E]."""
        u, z = mx.split(self.in_proj(x), 2, axis=-1)
        B, T, E = u.shape
        tail, state = self._before(cache, B, u.dtype)
        inputs = mx.concatenate([tail, u], axis=1)
        u = nn.silu(self.conv1d(inputs, None if samples is None else samples.same))
        dt, weights, readout = mx.split(self.x_proj(u).astype(mx.float32), self._split, axis=-1)
        dt = nn.softplus(self.dt_proj(dt.astype(u.dtype)).astype(mx.float32))
        A = -mx.exp(self.A_log.astype(mx.float32)).T
        wide = u.astype(mx.float32)
        if cache is not None and T <= REWIND:
            y, states = short_scan(wide, dt, A, weights, readout, state)
        else:
            y, last = selective_scan(wide, dt, A, weights, readout, state, None if samples is None else samples.keep)
            states = [last]
        if cache is not None:
            cache.update(inputs, states)
        y = (y + self.D * wide).astype(x.dtype)
        return self.out_proj(nn.silu(z) * y), y

    def _before(self, cache: RecurrentCache | None, B: int, dtype: mx.Dtype) -> list[mx.array]:
        """The convolution's inputs before the new tokens and the state: those cached, or zeros."""
        if cache is not None and cache.offset:
            return cache.arrays
        E, N = self.A_log.shape
        return [mx.zeros((B, self.conv1d.weight.shape[-1] - 1, E), dtype), mx.zeros((B, N, E), mx.float32)]


class Memory(nn.Module):
    """A gated memory unit: a token's input gates the memory that a Mamba layer made of it."""

    def __init__(self, config: Any):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, config.mamba_width, bias=False)
        self.out_proj = nn.Linear(config.mamba_width, config.hidden_size, bias=False)

    def __call__(self, x: mx.array, memory: mx.array) -> mx.array:
        return self.out_proj(nn.silu(self.in_proj(x)) * memory)


class InnerAttention(nn.Module):
    """The weights of the difference of two attentions."""

    def __init__(self, head_dim: int, layer: int):
        super().__init__()
        self.lambda_q1, self.lambda_k1 = mx.zeros((head_dim,)), mx.zeros((head_dim,))
        self.lambda_q2, self.lambda_k2 = mx.zeros((head_dim,)), mx.zeros((head_dim,))
        self.subln = nn.RMSNorm(2 * head_dim, eps=1e-5)
        self._initial = 0.8 - 0.6 * math.exp(-0.3 * layer)

    @property
    def weight(self) -> mx.array:
        """Lambda, a float32 scalar."""
        q1, k1, q2, k2 = (
            each.astype(mx.float32) for each in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        )
        return mx.exp((q1 * k1).sum()) - mx.exp((q2 * k2).sum()) + self._initial

    def normed(self, x: mx.array) -> mx.array:
        """The norm of the heads' outputs [.., 2 Dh]."""
        return self.subln(x) * (1 - self._initial)


class Attention(nn.Module):
    """Differential attention; heads in pairs, the even heads' less the odd heads'."""

    def __init__(self, config: Any, layer: int, *, cross: bool):
        super().__init__()
        self.H, self.K, self.Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        width = self.H * self.Dh
        self.Wqkv = nn.Linear(config.hidden_size, width + (0 if cross else 2 * self.K * self.Dh))
        self.out_proj = nn.Linear(width, config.hidden_size)
        self.inner_cross_attn = InnerAttention(self.Dh, layer)

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries [B, T, H * Dh], keys [B, K, T, Dh] (even heads first) and values [B, K / 2, T, 2 Dh]."""
        width, kv = self.H * self.Dh, self.K * self.Dh
        queries, keys, values = mx.split(self.Wqkv(x), [width, width + kv], axis=-1)
        B, T, _ = x.shape
        keys = keys.reshape(B, T, self.K // 2, 2, self.Dh).transpose(0, 3, 2, 1, 4).reshape(B, self.K, T, self.Dh)
        return queries, keys, values.reshape(B, T, self.K // 2, 2 * self.Dh).swapaxes(1, 2)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, window: int | None) -> mx.array:
        """[B, T, H * Dh] over keys [B, K, S, Dh] and values [B, K / 2, S, 2 Dh] -> [B, T, D]."""
        B, T, _ = queries.shape
        P = self.K // 2
        G = self.H // self.K
        q = queries.reshape(B, T, P, G, 2, self.Dh).transpose(0, 4, 2, 3, 1, 5) * self.Dh**-0.5
        inner = self.inner_cross_attn
        mixed = difference(q, keys.reshape(B, 2, P, -1, self.Dh), values, inner.weight, window)  # [B, P, G, T, 2 Dh]
        return self.out_proj(inner.normed(mixed).transpose(0, 3, 1, 2, 4).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: fc2(silu(gate) * up), gate before up in the fused projection."""

    def __init__(self, config: Any):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.fc1(x), 2, axis=-1)
        return self.fc2(nn.silu(gate) * up)


def mixer(config: Any, layer: int) -> nn.Module:
    """The mixer of a layer, by its place in the plan."""
    half = config.num_hidden_layers // 2
    if layer % 2 == 0:
        return Mamba(config) if layer <= half else Memory(config)
    return Attention(config, layer, cross=layer > half + 1)


class Layer(nn.Module):
    """One block; the residual stream is float32."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = mixer(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def normed(self, x: mx.array) -> mx.array:
        """The mixer's input, in the dtype of the weights."""
        return self.input_layernorm(x.astype(self.input_layernorm.weight.dtype))

    def rest(self, x: mx.array, mixed: mx.array) -> mx.array:
        """Everything after the mixer."""
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x.astype(mixed.dtype)))


class Decoder(nn.Module):
    """Everything below the head."""

    def __init__(self, config: Any):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, i) for i in range(config.num_hidden_layers)]
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self._window = config.sliding_window

    def __call__(self, ids: mx.array, caches: Any = None, rows: int | None = None) -> mx.array:
        x = self.embed_tokens(ids).astype(mx.float32)
        half = len(self.layers) // 2
        caches = [None] * (half + 2) if caches is None else caches
        for layer, cache in zip(self.layers[:half], caches, strict=False):
            h = layer.normed(x)
            if isinstance(layer.attn, Mamba):
                mixed, _ = layer.attn(h, cache, None)
            else:
                queries, keys, values = layer.attn.project(h)
                if cache is not None:
                    keys, values = cache.update_and_fetch(keys, values)
                mixed = layer.attn.attend(queries, keys, values, self._window)
            x = layer.rest(x, mixed)
        memorising, full = self.layers[half : half + 2]
        mixed, memory = memorising.attn(memorising.normed(x), caches[half], None)
        x = memorising.rest(x, mixed)
        queries, keys, values = full.attn.project(full.normed(x))
        if caches[half + 1] is not None:
            keys, values = caches[half + 1].update_and_fetch(keys, values)
        if rows is not None:
            x, memory, queries = x[:, -rows:], memory[:, -rows:], queries[:, -rows:]
        x = full.rest(x, full.attn.attend(queries, keys, values, None))
        for layer in self.layers[half + 2 :]:
            h = layer.normed(x)
            if isinstance(layer.attn, Memory):
                mixed = layer.attn(h, memory)
            else:
                mixed = layer.attn.attend(layer.attn.Wqkv(h), keys, values, None)
            x = layer.rest(x, mixed)
        return self.final_layernorm(x.astype(self.final_layernorm.weight.dtype))

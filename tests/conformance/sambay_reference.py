"""SambaY in NumPy and float64, token by token and pair by pair: slow, and written from the papers' formulas.

It has no cache, no chunks and no packed heads, so it shares no shortcut with the model that is compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from phi4_mlx.config.sambay import SambaYConfig

Array = np.ndarray
Weights = Mapping[str, Array]


def logits(config: SambaYConfig, weights: Weights, ids: Array) -> Array:
    """Logits [T, V] of ids [T]; the weights are float64, under the checkpoint's names."""
    half = config.num_hidden_layers // 2
    x = weights["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        own = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
        h = _layer_norm(x, own, "input_layernorm", config.layer_norm_eps)
        if i % 2 == 0 and i <= half:
            mixed, memory = _mamba(config, own, h)
        elif i % 2 == 0:
            mixed = (_silu(h @ own["attn.in_proj.weight"].T) * memory) @ own["attn.out_proj.weight"].T
        else:
            D, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
            projected = h @ own["attn.Wqkv.weight"].T + own["attn.Wqkv.bias"]
            queries = projected[:, :D]
            if i <= half + 1:
                keys, values = projected[:, D : D + kv], projected[:, D + kv :]
            mixed = _attention(config, own, i, queries, keys, values, config.sliding_window if i < half else len(ids))
        x = x + mixed
        h = _layer_norm(x, own, "post_attention_layernorm", config.layer_norm_eps)
        gate, up = np.split(h @ own["mlp.fc1.weight"].T, 2, axis=-1)
        x = x + (_silu(gate) * up) @ own["mlp.fc2.weight"].T
    x = _layer_norm(x, weights, "model.final_layernorm", config.layer_norm_eps)
    return x @ weights["model.embed_tokens.weight"].T


def _mamba(config: SambaYConfig, own: Weights, h: Array) -> tuple[Array, Array]:
    E, N, R, taps = config.mamba_width, config.mamba_d_state, config.mamba_dt_rank, config.mamba_d_conv
    u, z = np.split(h @ own["attn.in_proj.weight"].T, 2, axis=-1)
    A = -np.exp(own["attn.A_log"])
    state, outputs = np.zeros((E, N)), []
    for t in range(len(h)):
        c = own["attn.conv1d.bias"].copy()
        for back in range(min(t + 1, taps)):
            c += own["attn.conv1d.weight"][:, 0, taps - 1 - back] * u[t - back]
        c = _silu(c)
        dt, b, readout = np.split(own["attn.x_proj.weight"] @ c, [R, R + N])
        dt = np.log1p(np.exp(own["attn.dt_proj.weight"] @ dt + own["attn.dt_proj.bias"]))
        state = np.exp(dt[:, None] * A) * state + (dt * c)[:, None] * b
        outputs.append(state @ readout + own["attn.D"] * c)
    y = np.array(outputs)
    return (y * _silu(z)) @ own["attn.out_proj.weight"].T, y


def _attention(
    config: SambaYConfig, own: Weights, layer: int, queries: Array, keys: Array, values: Array, window: int
) -> Array:
    T, Dh = len(queries), config.head_dim
    q, k, v = (each.reshape(T, -1, Dh) for each in (queries, keys, values))
    inner = {name.removeprefix("attn.inner_cross_attn."): array for name, array in own.items()}
    initial = 0.8 - 0.6 * math.exp(-0.3 * layer)
    lam = math.exp(inner["lambda_q1"] @ inner["lambda_k1"]) - math.exp(inner["lambda_q2"] @ inner["lambda_k2"])
    at = np.arange(T)
    seen = (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)
    outputs = []
    for pair in range(config.num_attention_heads // 2):
        j = pair * config.num_key_value_heads // config.num_attention_heads  # the pair of keys that it reads
        wide = np.concatenate([v[:, 2 * j], v[:, 2 * j + 1]], axis=-1)
        first, second = (_softmax(q[:, 2 * pair + odd] @ k[:, 2 * j + odd].T / Dh**0.5, seen) for odd in (0, 1))
        out = (first - (lam + initial) * second) @ wide
        out = out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-5) * inner["subln.weight"]
        outputs.append(out * (1 - initial))
    return np.concatenate(outputs, axis=-1) @ own["attn.out_proj.weight"].T + own["attn.out_proj.bias"]


def _softmax(scores: Array, seen: Array) -> Array:
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _layer_norm(x: Array, own: Weights, name: str, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * own[name + ".weight"] + own[name + ".bias"]


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))

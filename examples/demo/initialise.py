"""Initial weights: random, except for a hand-made circuit that copies tokens.

Most of the demo's skills need copying, and a few million tokens are too few to learn it. So the model starts with an
induction head. The heads of the first layer attend one, two and three tokens back and write what they find into the
residual stream as notes. One head of the second layer attends to positions whose notes match the latest tokens, and
copies the token there. Spellings of one word start with similar embeddings. Training changes all of these weights.

The residual stream has unit size instead of the usual 0.02, because a training this short needs learning rates that
would overwrite smaller weights.

Source: Olsson et al., In-context Learning and Induction Heads (2022).
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from phi4_mlx.models.text import Model

BRANCH = 10.0  # scale of a random block's output, before division by the root of twice the depth
COMMON = 3.0  # first dimension, equal in all embeddings, so that heads can attend by position alone
FAST_PAIRS = 6  # rotary pairs that distinguish neighbouring positions
SLOW_PAIRS = 12  # rotary pairs that hardly rotate within a sequence, and so can carry content
MATCH = 2.5  # scale of the matching content in queries and keys
NOTE = 32  # dimensions of a note
TAKE = 10.0  # scale of the copied token
SHARPNESS = 8.0  # attention logit of the position that a first-layer head looks back to


def initialise(model: Model, seed: int, texts: list[str]) -> None:
    """Sets all weights of a model.

    Args:
        model: a model with one key head.
        seed: the seed of the random weights.
        texts: the text of each token, by id.
    """
    draw = np.random.default_rng(seed)
    config = model.config
    D, H, K, Dh = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert K == 1, "the circuit needs exactly one key head"

    # All directions except the common one: three blocks for notes, the rest for the tokens.
    basis, _ = np.linalg.qr(draw.normal(size=(D - 1, D - 1)))
    basis = np.concatenate([np.zeros((D - 1, 1)), basis.T], axis=1)
    notes, tokens = basis[: H * NOTE].reshape(H, NOTE, D), basis[H * NOTE :]

    embedding = _spellings_alike(draw, texts, config.vocab_size, len(tokens)) @ tokens
    embedding *= (D - COMMON**2) ** 0.5 / np.linalg.norm(embedding, axis=1, keepdims=True)
    embedding[:, 0] = COMMON
    model.model.embed_tokens.weight = _array(embedding)
    model.model.norm.weight = mx.full((D,), 0.08)  # tied embeddings: keeps the first logits small

    depth = (2 * len(model.layers)) ** -0.5
    for layer in model.layers:
        F = config.intermediate_size
        layer.self_attn.qkv_proj.weight = _array(draw.normal(size=((H + 2 * K) * Dh, D)) * D**-0.5)
        layer.self_attn.o_proj.weight = _array(draw.normal(size=(D, H * Dh)) * D**-0.5 * BRANCH * depth)
        layer.mlp.gate_up_proj.weight = _array(draw.normal(size=(2 * F, D)) * D**-0.5)
        layer.mlp.down_proj.weight = _array(draw.normal(size=(D, F)) * F**-0.5 * BRANCH * depth)

    _look_back(model, tokens, notes)
    _find_and_take(model, draw, tokens, notes)


def _spellings_alike(draw: np.random.Generator, texts: list[str], rows: int, width: int) -> np.ndarray:
    """Embeddings [rows, width]; those of " miles", "miles" and "Miles" are similar, so one can be copied as another."""
    embedding, space, capital = draw.normal(size=(rows, width)), draw.normal(size=width), draw.normal(size=width)
    roots: dict[str, np.ndarray] = {}
    for token, text in enumerate(texts):
        word = text.strip().lower()
        if word.isalpha():
            root = roots.setdefault(word, draw.normal(size=width))
            form = space * text.startswith(" ") + capital * text.strip()[0].isupper()
            embedding[token] = 0.8 * root + 0.4 * form + 0.4 * embedding[token]
    return embedding


def _look_back(model: Model, tokens: np.ndarray, notes: np.ndarray) -> None:
    """First layer: head h attends h + 1 tokens back and writes that token as a note."""
    config, attention = model.config, model.layers[0].self_attn
    D, H, Dh, pairs = config.hidden_size, config.num_attention_heads, config.head_dim, config.rotary_dims // 2
    turns = config.rope_theta ** (-np.arange(FAST_PAIRS) / pairs)  # radians per token
    assert config.rope_scaling is not None
    size = (SHARPNESS * Dh**0.5 / config.rope_scaling.attention_factor**2) ** 0.5 / COMMON
    queries, keys, values = np.zeros((H, Dh, D)), np.zeros((Dh, D)), np.zeros((Dh, D))
    keys[:FAST_PAIRS, 0] = size
    values[:NOTE] = tokens[:NOTE]
    out = np.zeros((D, H, Dh))
    for head in range(H):
        queries[head, :FAST_PAIRS, 0] = size * np.cos(turns * (head + 1))
        queries[head, pairs : pairs + FAST_PAIRS, 0] = -size * np.sin(turns * (head + 1))
        out[:, head, :NOTE] = notes[head].T * 1.5
    attention.qkv_proj.weight = _array(np.concatenate([*queries, keys, values]))
    attention.o_proj.weight = _array(out.reshape(D, H * Dh))


def _find_and_take(model: Model, draw: np.random.Generator, tokens: np.ndarray, notes: np.ndarray) -> None:
    """Second layer: the first head attends to positions preceded by the latest tokens, and copies their token."""
    config, attention = model.config, model.layers[1].self_attn
    D, H, Dh, pairs = config.hidden_size, config.num_attention_heads, config.head_dim, config.rotary_dims // 2
    still = [*range(2 * pairs, Dh), *range(pairs - SLOW_PAIRS, pairs), *range(2 * pairs - SLOW_PAIRS, 2 * pairs)]
    queries, keys = draw.normal(size=(H, Dh, D)) * D**-0.5 * 0.3, np.zeros((Dh, D))
    queries[0] = 0
    for back, read in enumerate([tokens, *notes[:-1]]):
        part = still[back::H]
        keys[part], queries[0, part] = notes[back, : len(part)] * MATCH, read[: len(part)] * MATCH
    out = draw.normal(size=(D, H, Dh)) * D**-0.5
    out[:, 0] = tokens[:Dh].T * TAKE
    attention.qkv_proj.weight = _array(np.concatenate([*queries, keys, tokens[:Dh]]))
    attention.o_proj.weight = _array(out.reshape(D, H * Dh))


def _array(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32))

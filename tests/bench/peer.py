"""One model as ours and as mlx-lm's, over the same arrays.

Random weights have the shapes of Phi-4-mini, cut in depth and, where a script says so, in width. Activations are
float32: a CPU multiplies 4-bit matrices at 3 GFLOP/s in float32, and at a tenth of that in bfloat16.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from harness import ROOT
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import phi3

from phi4_mlx.checkpoint import load_model
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.hub import resolve
from phi4_mlx.models.text import Model

sys.path.insert(0, str(ROOT))
from tests.presets import PRESETS

HEAD_DIM = 128  # Phi-4-mini's; the same at every width, so that its RoPE tables fit


def config_of(layers: int, kv_heads: int = 8, vocab_size: int = 200_064) -> ModelConfig:
    """Phi-4-mini's config at another depth and width: 3 query heads per key head, MLP width 8/3 of the hidden size."""
    hidden = 3 * kv_heads * HEAD_DIM
    return replace(
        PRESETS["phi-4-mini"],
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_attention_heads=3 * kv_heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab_size,
    )


def random_pair(config: ModelConfig) -> tuple[Model, phi3.Model]:
    """(ours, mlx-lm's) with random 4-bit weights in groups of 64; the rows of each matrix have unit length."""
    bits = np.random.default_rng(1)

    def draw(path: str, old: mx.array) -> mx.array:
        if old.dtype == mx.uint32:
            return mx.array(bits.integers(0, 2**32, old.shape, np.uint32))
        if path.endswith(("scales", "biases")):  # shift the numbers 0 to 15, of standard deviation 4.61, to mean 0
            step = (64 * old.shape[1]) ** -0.5 / 4.61
            return mx.full(old.shape, step if path.endswith("scales") else -7.5 * step, mx.float32)
        return mx.ones(old.shape, mx.float32)

    ours = Model(config)
    nn.quantize(ours, group_size=64, bits=4)
    ours.update(tree_map_with_path(draw, ours.parameters()))
    mx.eval(ours.parameters())
    return ours.eval(), their_model(ours)


def demo_pair() -> tuple[Model, phi3.Model]:
    """(ours, mlx-lm's) of the embedded package; mlx-lm gets our arrays instead of reading the folder."""
    ours = load_model(resolve("demo"))
    mx.eval(ours.parameters())
    return ours, their_model(ours)


def their_model(ours: Model) -> phi3.Model:
    """mlx-lm's model over our arrays."""
    theirs = phi3.Model(phi3.ModelArgs.from_dict(ours.config.to_dict()))
    if any(path.endswith(".scales") for path, _ in tree_flatten(ours.parameters())):
        nn.quantize(theirs, group_size=64, bits=4)
    theirs.update(ours.parameters())
    theirs.eval()
    return theirs


def logits_difference(ours: Model, theirs: phi3.Model, tokens: int = 32) -> float:
    """Largest relative difference of the logits under the long RoPE table, the only one that mlx-lm has."""
    ids = mx.arange(tokens)[None]
    a, b = ours(ids, ours.make_cache("long")), theirs(ids)
    return float((mx.abs(a - b).max() / mx.abs(b).max()).item())

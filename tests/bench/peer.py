"""The same model twice, ours and mlx-lm's, over the same arrays: what the scripts beside it measure.

Random weights have the shapes of Phi-4-mini, cut in depth and, where a script says so, in width. Activations are
float32: products of 4-bit matrices run at 3 GFLOP/s on a CPU in float32, and at a tenth of that in bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.generate import generate_step as their_generate_step
from mlx_lm.models import phi3

from phi4_mlx.checkpoint import load_model
from phi4_mlx.config import PRESETS, ModelConfig
from phi4_mlx.hub import resolve
from phi4_mlx.models.text import Model

HEAD_DIM = 128  # of Phi-4-mini; kept at any width, so that its RoPE tables fit


def config_of(layers: int, kv_heads: int = 8, vocab_size: int = 200_064) -> ModelConfig:
    """Phi-4-mini's config at another depth and width: three queries a key head, an MLP of 8/3 of the width."""
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


def random_pair(config: ModelConfig) -> tuple[Model, Any]:
    """(ours, mlx-lm's), random 4-bit weights in groups of 64, rows of unit length."""
    bits = np.random.default_rng(1)

    def draw(path: str, old: mx.array) -> mx.array:
        if old.dtype == mx.uint32:
            return mx.array(bits.integers(0, 2**32, old.shape, np.uint32))
        if path.endswith(("scales", "biases")):  # numbers from 0 to 15 come out around zero
            step = (64 * old.shape[1]) ** -0.5 / 4.61  # 4.61: their standard deviation
            return mx.full(old.shape, step if path.endswith("scales") else -7.5 * step, mx.float32)
        return mx.ones(old.shape, mx.float32)

    ours = Model(config)
    nn.quantize(ours, group_size=64, bits=4)
    ours.update(tree_map_with_path(draw, ours.parameters()))
    mx.eval(ours.parameters())
    return ours.eval(), their_model(ours)


def demo_pair() -> tuple[Model, Any]:
    """(ours, mlx-lm's) of the embedded package; mlx-lm is handed the weights, since it does not read the tokenizer."""
    ours = load_model(resolve("demo"))
    mx.eval(ours.parameters())
    return ours, their_model(ours)


def their_model(ours: Model) -> Any:
    """mlx-lm's model over our arrays."""
    theirs = phi3.Model(phi3.ModelArgs.from_dict(ours.config.to_dict()))
    if any(path.endswith(".scales") for path, _ in tree_flatten(ours.parameters())):
        nn.quantize(theirs, group_size=64, bits=4)
    theirs.update(ours.parameters())
    return theirs.eval()


def logits_difference(ours: Model, theirs: Any, tokens: int = 32) -> float:
    """Largest difference of the logits under the long RoPE table, the only one that mlx-lm has: the models are one."""
    ids = mx.arange(tokens)[None]
    a, b = ours(ids, ours.make_cache("long")), theirs(ids)
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


def alternate(ours: Callable[[], float], theirs: Callable[[], float], runs: int) -> tuple[list[float], list[float]]:
    """What both return, run in turns: whoever goes first goes second in the next pair."""
    mine, other = [], []
    for run in range(runs):
        for measure, into in ((ours, mine), (theirs, other)) if run % 2 == 0 else ((theirs, other), (ours, mine)):
            into.append(measure())
    return mine, other


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of pairs."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def last_line(name: str, ok: bool, **figures: Any) -> None:
    """Prints the result of a script."""
    print(json.dumps({"bench": name, **figures, "ok": bool(ok)}))


__all__ = [
    "HEAD_DIM", "alternate", "config_of", "demo_pair", "last_line", "logits_difference", "median_ratio", "random_pair",
    "their_generate_step", "their_model",
]  # fmt: skip

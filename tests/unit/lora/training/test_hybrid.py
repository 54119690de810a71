"""Gradients of the hybrid, against finite differences of a reference."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.lora.training.loss import next_token_loss
from tests.conformance import sambay_reference
from tests.tiny_sambay import make_tiny_sambay

STEP = 1e-4  # of a central difference, in float64
IDS = [int(token) for token in np.random.default_rng(5).integers(3, 500, 40)]

PLACES = (
    "0.attn.A_log", "2.attn.D", "0.attn.dt_proj.bias", "0.attn.dt_proj.weight", "4.attn.x_proj.weight",
    "2.attn.conv1d.weight", "0.attn.conv1d.bias", "0.attn.in_proj.weight", "6.attn.out_proj.weight",
    "1.attn.inner_cross_attn.lambda_q1", "5.attn.inner_cross_attn.lambda_k2", "7.attn.inner_cross_attn.lambda_q2",
    "3.attn.inner_cross_attn.subln.weight", "5.attn.Wqkv.bias", "7.attn.Wqkv.weight", "1.attn.out_proj.bias",
    "3.mlp.fc1.weight", "2.input_layernorm.bias",
)  # fmt: skip


@pytest.mark.slow
def test_gradients_are_the_differences_of_the_reference() -> None:
    """Along a random direction in each tensor, with the loss of a reference in NumPy and float64."""
    model = make_tiny_sambay().train()
    ids, targets = mx.array([IDS[:-1]]), mx.array([IDS[1:]])
    _, grads = nn.value_and_grad(model, next_token_loss)(model, ids, targets, mx.ones(ids.shape) > 0)
    weights = {name: np.array(each, np.float64) for name, each in tree_flatten(model.parameters())}
    found = dict(tree_flatten(grads))

    def loss(name: str, value: np.ndarray) -> float:
        logits = sambay_reference.logits(model.config, weights | {name: value}, np.array(IDS[:-1]))
        logits -= logits.max(axis=-1, keepdims=True)
        return float((np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(IDS) - 1), IDS[1:]]).mean())

    for place in PLACES:
        name = f"model.layers.{place}"
        direction = np.random.default_rng(1).normal(size=weights[name].shape)
        rise = loss(name, weights[name] + STEP * direction) - loss(name, weights[name] - STEP * direction)
        ours = float((np.array(found[name], np.float64) * direction).sum())
        size = float(np.linalg.norm(np.array(found[name]))) * float(np.linalg.norm(direction)) / direction.size**0.5
        assert abs(ours - rise / (2 * STEP)) < 1e-3 * size, (place, ours, rise / (2 * STEP))
        assert size > 0

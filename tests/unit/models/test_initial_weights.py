"""The weights of a new SambaY model, from which it can be trained."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from phi4_mlx.config.sambay import SambaYConfig
from phi4_mlx.models.sambay import Model
from tests.tiny_sambay import sambay_config_dict


def test_a_new_model_has_the_references_initial_weights() -> None:
    model = Model(SambaYConfig.from_dict(sambay_config_dict(hidden_size=512, mamba_d_state=16)))
    weights = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    mamba, attention = "model.layers.0.attn.", "model.layers.1.attn.inner_cross_attn."
    steps = np.sort(np.array(nn.softplus(mx.array(weights[f"{mamba}dt_proj.bias"]))))
    assert 0.9e-3 < steps[0] < 1.2e-3 and 0.85e-1 < steps[-1] < 1.01e-1
    assert 0.8e-2 < np.median(steps) < 1.25e-2  # even on a log scale
    assert np.allclose(np.exp(weights[f"{mamba}A_log"]), np.arange(1, 17), rtol=1e-5)
    assert (weights[f"{mamba}D"] == 1).all()
    assert 0.45 < np.abs(weights[f"{mamba}conv1d.weight"]).max() <= 0.5  # 1 / sqrt(4 taps)
    lambdas = np.concatenate([each for name, each in weights.items() if "lambda_" in name])
    assert abs(lambdas.std() - 0.1) < 0.015 and abs(lambdas.mean()) < 0.02
    assert not np.array_equal(weights[f"{attention}lambda_q1"], weights[f"{attention}lambda_q2"])

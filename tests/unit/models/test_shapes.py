"""SambaY models of unusual shapes: a cache and packed samples give the logits of one pass."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest

from tests.model_runs import close
from tests.tiny_sambay import make_tiny_sambay


@pytest.mark.parametrize(
    "shape",
    [
        {"mamba_d_conv": 1}, {"mamba_d_conv": 2}, {"mamba_d_state": 1}, {"mamba_expand": 1}, {"mamba_dt_rank": 1},
        {"sliding_window": 1}, {"sliding_window": 5000}, {"num_attention_heads": 2, "num_key_value_heads": 2},
        {"num_attention_heads": 32, "num_key_value_heads": 2}, {"num_hidden_layers": 12},
    ],
)  # fmt: skip
def test_every_shape_that_a_config_allows_can_be_chunked_and_packed(shape: dict[str, Any]) -> None:
    model = make_tiny_sambay(**shape)
    ids = mx.array([list(range(5, 45))])
    whole, cache = model(ids), model.make_cache()
    bounds = [0, 17, 18, 19, 39, 40]
    chunks = [model(ids[:, first:last], cache) for first, last in pairwise(bounds)]
    assert close(mx.concatenate(chunks, axis=1), whole)
    packed = model.logits(model.hidden(ids, segments=mx.array([[1] * 20 + [2] * 20])))
    assert close(packed, mx.concatenate([model(ids[:, :20]), model(ids[:, 20:])], axis=1))

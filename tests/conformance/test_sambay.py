"""The SambaY decoder against a reference in NumPy and float64 that shares no shortcut with it.

Tolerances are in standard deviations of the logits: 2e-4 in float32, and a root-mean-square of 0.02 in bfloat16.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.sambay import Model
from tests.conformance import sambay_reference
from tests.tiny_sambay import make_tiny_sambay

TOLERANCE = 2e-4
BFLOAT16 = 0.02  # 0.014 here; 0.020 where gates and norms are in bfloat16
WINDOW = 16

# Beside the default: no grouping of queries, more layers, other sizes of the state-space layers, a window of one token.
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "no grouping": {"num_key_value_heads": 8},
    "one pair of keys": {"num_key_value_heads": 2},
    "12 blocks": {"num_hidden_layers": 12},
    "other states": {"mamba_d_state": 7, "mamba_d_conv": 3, "mamba_expand": 3, "mamba_dt_rank": 5},
    "window of 1": {"sliding_window": 1},
}


def reference(model: Model, ids: list[int]) -> np.ndarray:
    weights = {name: np.array(each.astype(mx.float32), np.float64) for name, each in tree_flatten(model.parameters())}
    return sambay_reference.logits(model.config, weights, np.array(ids))


def deviation(found: mx.array, expected: np.ndarray) -> float:
    return float(np.abs(np.array(found.astype(mx.float32)) - expected).max() / expected.std())


def random_ids(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 500, length)]


def in_chunks(model: Model, ids: list[int], size: int) -> mx.array:
    cache = model.make_cache()
    return mx.concatenate(
        [model(mx.array([ids[at : at + size]]), cache) for at in range(0, len(ids), size)], axis=1
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_references_whole_in_chunks_and_stepped(shape: str) -> None:
    model, ids = make_tiny_sambay(seed=len(shape), **SHAPES[shape]), random_ids(75)
    expected = reference(model, ids)
    for found in (model(mx.array([ids])), *(in_chunks(model, ids, size) for size in (1, 5, WINDOW, 33, 74))):
        assert deviation(found[0], expected) <= TOLERANCE
        assert (np.array(found[0]).argmax(-1) == expected.argmax(-1)).all()


def random_shape(seed: int) -> dict[str, Any]:
    """Sizes that a config allows: odd ranks, windows from 1, one to four queries a key."""
    draw = np.random.default_rng(seed)

    def one_of(*values: int) -> int:
        return int(draw.choice(values))

    kv_heads, head_dim = one_of(2, 4), one_of(6, 8, 12)
    heads = kv_heads * one_of(1, 2, 4)
    return {
        "num_hidden_layers": one_of(8, 8, 12, 16),
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "sliding_window": int(draw.integers(1, 41)),
        "mamba_d_state": int(draw.integers(4, 17)),
        "mamba_d_conv": int(draw.integers(2, 5)),
        "mamba_dt_rank": one_of(1, 3, 5, 9),
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rates", [-8.0, 0.0, 4.0])  # added to A_log: states that last, and that are gone at once
def test_logits_of_random_shapes_are_the_references(seed: int, rates: float) -> None:
    shape = random_shape(seed)
    model = make_tiny_sambay(seed, **shape)
    for layer in model.layers[: shape["num_hidden_layers"] // 2 + 1 : 2]:
        layer.attn.A_log = layer.attn.A_log + rates
    ids = random_ids(4 * shape["sliding_window"] + 3, seed)
    expected, size = reference(model, ids), 1 + seed * 7
    for found in (model(mx.array([ids])), in_chunks(model, ids, size)):
        assert deviation(found[0], expected) <= TOLERANCE
        assert (np.array(found[0]).argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("T", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW, 130])
def test_wanted_rows_alone_have_the_logits_of_all(T: int) -> None:
    model, ids = make_tiny_sambay(seed=3), random_ids(T, seed=T)
    expected = reference(model, ids)
    for rows in {1, min(3, T)}:
        found = model.logits(model.hidden(mx.array([ids]), model.make_cache(), rows=rows))[0]
        assert deviation(found, expected[-rows:]) <= TOLERANCE


def test_greedy_tokens_are_the_references() -> None:
    model, ids = make_tiny_sambay(seed=4), random_ids(40, seed=4)
    found = [token for token, _ in generate_step(mx.array(ids), model, max_tokens=24)]
    for token in found:
        assert token == reference(model, ids)[-1].argmax()
        ids.append(token)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [5, 6])
def test_bfloat16_stays_close_with_its_state_in_float32(seed: int) -> None:
    model = make_tiny_sambay(seed=seed)
    exact = {"A_log", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"}
    model.apply_to_modules(
        lambda _, module: module.update(
            {
                name: array.astype(mx.bfloat16)
                for name, array in module.items()
                if isinstance(array, mx.array) and name not in exact and not name.startswith("_")
            }
        )
    )
    ids = random_ids(320, seed=seed)
    expected = reference(model, ids)
    found = np.array(model(mx.array([ids]))[0].astype(mx.float32))
    last = slice(220, None)
    assert np.sqrt(((found - expected)[last] ** 2).mean()) <= BFLOAT16 * expected.std()
    stepped = np.array(in_chunks(model, ids, 40)[0].astype(mx.float32))
    assert np.sqrt(((stepped - expected)[last] ** 2).mean()) <= BFLOAT16 * expected.std()

"""The decoder against transformers' Phi3ForCausalLM: golden.npz, written by make_golden.py.

In fp32 with logits of unit scale: maximum absolute difference 2e-4, the same argmax everywhere, and the same 64 greedy
tokens across the LongRoPE boundary, for every combination of config options in the family.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.config.text import ModelConfig
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.text import Model
from tests.conformance import recipe

GOLDEN = np.load(Path(__file__).with_name("golden.npz"))
TOLERANCE = 2e-4


def build(case: str) -> Model:
    model = Model(ModelConfig.from_dict(recipe.config(case)))
    shapes = {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}
    model.load_weights([(name, mx.array(array)) for name, array in recipe.weights(case, shapes).items()])
    return model.eval()


def whole(model: Model, ids: mx.array) -> mx.array:
    return model(ids)


def cached(model: Model, ids: mx.array) -> mx.array:
    return model(ids, model.make_cache())


def admitted_chunks(model: Model, ids: mx.array) -> mx.array:
    """As generation prefills: the whole length decides the RoPE table of every chunk."""
    cache = model.make_cache()
    ids = cache.admit(ids)
    hidden = [model.hidden(ids[:, at : at + 5], cache) for at in range(0, ids.shape[1], 5)]
    logits = model.logits(mx.concatenate(hidden, axis=1))
    assert cache.rerun_tokens == 0
    return logits


@pytest.mark.parametrize("prefill", [whole, cached, admitted_chunks])
@pytest.mark.parametrize("case", recipe.CASES)
def test_logits_are_the_references(case: str, prefill: Callable[[Model, mx.array], mx.array]) -> None:
    model = build(case)
    for T in recipe.LENGTHS:
        logits = np.array(prefill(model, mx.array(recipe.tokens(case)[None, :T])))[0]
        expected = GOLDEN[f"{case}/logits{T}"]
        assert np.abs(logits - expected).max() <= TOLERANCE, f"T = {T}"
        assert (logits.argmax(-1) == expected.argmax(-1)).all(), f"T = {T}"


@pytest.mark.parametrize("case", recipe.CASES)
def test_the_last_logits_do_not_depend_on_the_chunk_size(case: str) -> None:
    """Unannounced chunks: at the boundary, the model runs the cached tokens again."""
    model, ids = build(case), mx.array(recipe.tokens(case)[None])
    for step in (1, 7, recipe.BOUNDARY):
        cache = model.make_cache()
        for at in range(0, ids.shape[1], step):
            logits = model(ids[:, at : at + step], cache)
        expected = GOLDEN[f"{case}/logits{recipe.LENGTHS[-1]}"][-logits.shape[1] :]
        assert np.abs(np.array(logits)[0] - expected).max() <= TOLERANCE


@pytest.mark.parametrize("step_size", [3, 2048])
@pytest.mark.parametrize("case", recipe.CASES)
def test_greedy_tokens_are_the_references(case: str, step_size: int) -> None:
    model, prompt = build(case), recipe.tokens(case)[: recipe.PROMPT_LENGTH].tolist()
    steps = generate_step(prompt, model, max_tokens=recipe.NEW_TOKENS, prefill_step_size=step_size)
    assert [token for token, _ in steps] == GOLDEN[f"{case}/generated"].tolist()


@pytest.mark.parametrize("case", recipe.CASES)
def test_both_config_layouts_give_the_same_config(case: str) -> None:
    """transformers 5 writes rope_parameters instead of rope_scaling and rope_theta."""
    as_v5 = json.loads(str(GOLDEN[f"{case}/config"]))
    assert "rope_parameters" in as_v5 and "rope_theta" not in as_v5
    config = ModelConfig.from_dict(recipe.config(case))
    assert ModelConfig.from_dict(as_v5) == config
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_the_two_tables_differ() -> None:
    """Otherwise the tests above would pass with one table for all lengths."""
    case = "tied-rotary0.75-gqa3-longrope"
    model, ids = build(case), mx.array(recipe.tokens(case)[None, : recipe.BOUNDARY])
    wrong = np.array(model(ids, model.make_cache("long")))[0]
    expected = GOLDEN[f"{case}/logits{recipe.BOUNDARY}"]
    assert np.abs(wrong - expected).max() > 0.5

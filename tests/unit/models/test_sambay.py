"""The work of SambaY: rows that nobody reads are not computed, and compiled steps equal plain ones."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map_with_path

from phi4_mlx.generation.steps import finish_chunk, generate_step
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.sambay import Model
from tests.model_runs import random_ids
from tests.tiny_sambay import make_tiny_sambay

SHARED = 6  # of the 8 blocks: those with caches; the last of them is the full attention


def cast(model: Model, dtype: mx.Dtype) -> Model:
    """The model as a checkpoint of this dtype has it: A_log and the lambdas stay float32."""
    model.update(
        tree_map_with_path(
            lambda path, array: array if re.search(r"A_log|lambda|\._", path) else array.astype(dtype),
            model.parameters(),
        )
    )
    return model


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("quantised", [False, True])
def test_compiled_steps_equal_plain_ones_to_the_bit(dtype: mx.Dtype, quantised: bool) -> None:
    model = cast(make_tiny_sambay(), dtype)
    if quantised:
        nn.quantize(model, 32, 4, class_predicate=model.quantizable)
    caches = [model.make_cache(), model.make_cache()]
    for cache in caches:
        mx.eval(model(random_ids(21), cache))
    for token in random_ids(40)[0]:
        step = token.reshape(1, 1)
        compiled = model(step, caches[0])
        plain = model.logits(model.hidden(step, caches[1], embeddings=model.head(step)))  # given embeddings
        assert mx.array_equal(compiled, plain)


def test_the_upper_half_sees_the_wanted_rows_alone() -> None:
    model = make_tiny_sambay()
    seen: list[list[int]] = [[] for _ in model.layers]
    numbers = {id(block): i for i, block in enumerate(model.layers)}
    model.watch = lambda block, x: seen[numbers[id(block)]].append(x.shape[1])
    next(generate_step(random_ids(40)[0], model, max_tokens=1, prefill_step_size=16))
    chunks = [16, 16, 7, 1]  # a snapshot stands before the last token
    assert all(seen[i] == chunks for i in range(SHARED - 1))
    assert all(seen[i] == [1] * 4 for i in range(SHARED - 1, 8))


def test_what_a_chunk_caches_depends_on_nothing_above_the_shared_keys() -> None:
    model = make_tiny_sambay()
    above = (rf"layers\.{SHARED - 1}\.(mlp|attn\.out_proj)", *(rf"layers\.{i}\." for i in range(SHARED, 8)))
    model.update(
        tree_map_with_path(
            lambda path, array: mx.full(array.shape, mx.nan) if re.search("|".join(above), path) else array,
            model.parameters(),
        )
    )
    cache = model.make_cache()
    hidden = model.hidden(random_ids(20), cache, rows=1)
    assert mx.isnan(hidden).all()
    assert not any(mx.isnan(array).any() for layer in cache for array in layer.state)


def nodes(cache: PromptCache, folder: Path) -> int:
    """The nodes of the graph that a chunk's caches wait for."""
    path = folder / "graph.dot"
    mx.export_to_dot(str(path), *(array for layer in cache for array in layer.state))
    return len(re.findall(r"shape ?= ?rectangle", path.read_text()))


def test_every_later_chunk_does_the_work_of_the_second(tmp_path: Path) -> None:
    model = make_tiny_sambay(max_position_embeddings=4096)
    chunks = mx.split(random_ids(6 * 128), 6, axis=1)
    runs = []
    for _ in range(8):  # the least figures count: on a busy machine, MLX frees later
        cache, found, own = model.make_cache(), [], []
        for chunk in chunks:
            mx.synchronize()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            model.hidden(chunk, cache, rows=1)
            found.append(nodes(cache, tmp_path))
            finish_chunk(cache, False)
            own.append(mx.get_peak_memory() - before)
        runs.append(own)
    peaks = [min(each) for each in zip(*runs, strict=True)]
    assert max(found[1:]) - min(found[1:]) <= 10  # those of a buffer that grows
    assert max(peaks[2:]) <= peaks[1] + cache[SHARED - 1].nbytes


def test_a_float16_model_stays_finite_where_its_residual_stream_is_past_the_largest_float16() -> None:
    model = make_tiny_sambay()
    loud = 2e4 * np.sign(np.random.default_rng(0).normal(size=64))
    for block in model.layers[1::2]:
        block.attn.out_proj.bias = mx.array(loud, mx.float32)
    expected = model(random_ids(50))
    found = cast(model, mx.float16)(random_ids(50))
    assert abs(loud).max() * 4 > 65_504
    assert found.dtype == mx.float16 and mx.allclose(found, expected, atol=0.05 * mx.std(expected).item())

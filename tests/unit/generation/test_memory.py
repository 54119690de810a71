"""The memory plan of a context: predicted bytes equal measured ones, up to 131,072 tokens."""

from __future__ import annotations

import gc
from dataclasses import replace

import mlx.core as mx
import pytest

from phi4_mlx.config.sambay import SambaYConfig
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.memory import ContextPlan, check_context, plan_context
from phi4_mlx.models.machine import memory_limit
from phi4_mlx.models.model import ContextCost
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.sambay import Model as SambaYModel
from phi4_mlx.models.state import WindowCache
from phi4_mlx.models.text import Model
from tests.conftest import TinyModel
from tests.model_runs import peak_memory
from tests.tiny_sambay import make_tiny_sambay

HEADS = {"hidden_size": 256, "head_dim": 128, "num_attention_heads": 24, "num_key_value_heads": 8}
FACTORS = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


def random_cache(model: Model, length: int, kv_bits: int | None) -> PromptCache:
    """A cache of `length` tokens, a multiple of 256, with random keys and values in place of computed ones."""
    cache = model.make_cache(kv_bits=kv_bits)
    K, Dh = model.config.num_key_value_heads, model.config.head_dim
    for number, layer in enumerate(cache):
        for start in range(0, length, 8192):
            part = mx.random.normal((1, K, min(8192, length - start), Dh), key=mx.random.key(start + number))
            mx.eval(layer.update_and_fetch(part, part))
    cache.restore([1] * length, [layer.state for layer in cache], "long")
    return cache


@pytest.mark.slow
def test_the_last_chunk_and_steps_of_a_full_context_take_the_planned_bytes(tiny_model: TinyModel) -> None:
    S, T = 131_072, 2
    model = tiny_model(num_hidden_layers=3, max_position_embeddings=S, rope_scaling=FACTORS, **HEADS)
    cache, plan = random_cache(model, S - 256, 4), plan_context(model, kv_bits=4)
    others = mx.get_active_memory() - plan.weights_bytes - cache.nbytes
    chunk = peak_memory(lambda: model(mx.ones((1, T), mx.int32), cache)) - others
    assert 0.9 < chunk / plan.peak_bytes(S, T) < 1.1, f"{chunk / 1e6:.1f} MB, planned {plan.peak_bytes(S, T) / 1e6:.1f}"
    for _ in range(3):  # on a CPU, quantised matmul copies its slices: those of a layer or two
        step = peak_memory(lambda: model(mx.ones((1, 1), mx.int32), cache)) - others
        assert step < plan.peak_bytes(S, T) + 2 * plan.cache_bytes(S) // 3


@pytest.mark.slow
@pytest.mark.parametrize("kv_bits", [None, 4, 8])
def test_the_planned_cache_equals_the_real_one_to_the_byte(tiny_model: TinyModel, kv_bits: int | None) -> None:
    model = tiny_model(max_position_embeddings=4096, **HEADS, rope_scaling=FACTORS)
    plan = plan_context(model, kv_bits)
    for length in (1, 256, 257):
        cache = model.make_cache(kv_bits=kv_bits)
        mx.eval(model(mx.ones((1, length), mx.int32), cache))
        assert cache.nbytes == plan.cache_bytes(length)


def test_one_token_more_than_the_longest_context_does_not_fit(tiny_model: TinyModel) -> None:
    plan = replace(plan_context(tiny_model(max_position_embeddings=4096)), limit_bytes=0)
    assert plan.most_tokens == 0 and plan.limit_bytes == 0
    for length in (1, 700, 4096):
        limited = replace(plan, limit_bytes=plan.peak_bytes(length))
        assert limited.most_tokens >= length and limited.peak_bytes(limited.most_tokens) <= limited.limit_bytes
        assert limited.most_tokens == 4096 or limited.peak_bytes(limited.most_tokens + 1) > limited.limit_bytes
    assert replace(plan, limit_bytes=10**15).most_tokens == 4096 and memory_limit() > 10**9


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [100, 256, 700, 2048])
def test_a_bounded_cache_takes_at_most_its_bound_and_a_chunk(tiny_model: TinyModel, chunk: int) -> None:
    model = tiny_model(max_position_embeddings=4096)
    plan = plan_context(model, max_kv_size=512)
    cache, most = model.make_cache(max_kv_size=512), 0
    for start in range(0, 3000, chunk):
        mx.eval(model(mx.ones((1, min(chunk, 3000 - start)), mx.int32), cache))
        most = max(most, cache.nbytes)
    assert 0.75 < most / plan.cache_bytes(3000, chunk) <= 1.0
    assert plan.cache_bytes(4096, chunk) == plan.cache_bytes(3000, chunk) and plan.most_tokens == 4096


@pytest.mark.slow
@pytest.mark.parametrize("kv_bits", [None, 4])
@pytest.mark.parametrize("length", [300, 2048])
def test_a_prefill_takes_the_planned_bytes(tiny_model: TinyModel, kv_bits: int | None, length: int) -> None:
    wide = {"hidden_size": 192, "head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 2}
    model = tiny_model(num_hidden_layers=12, max_position_embeddings=4096, **wide)
    plan, cache = plan_context(model, kv_bits), model.make_cache("long", kv_bits)
    others = mx.get_active_memory() - plan.weights_bytes
    taken = peak_memory(lambda: model.hidden(mx.ones((1, length), mx.int32), cache, rows=1)) - others
    assert 0.8 < taken / plan.peak_bytes(length) < 1.2, f"{taken / 1e6:.1f} MB, planned {plan.peak_bytes(length) / 1e6}"


@pytest.mark.parametrize("length", [256, 300, 1024])
def test_a_cache_keeps_only_its_buffers_alive(tiny_model: TinyModel, length: int) -> None:
    model = tiny_model(max_position_embeddings=4096)
    mx.eval(model(mx.ones((1, 1), mx.int32)))
    cache = model.make_cache("long")
    gc.collect()
    mx.clear_cache()  # MLX reuses freed buffers that are larger than asked for
    before = mx.get_active_memory()
    mx.eval(model(mx.ones((1, length), mx.int32), cache))
    allocated = mx.get_active_memory() - before
    assert cache.nbytes <= allocated < cache.nbytes + 10_000  # a view of the chunk's heads would double it


def test_a_context_that_does_not_fit_is_refused_with_the_longest_that_does() -> None:
    plan = ContextPlan(
        weights_bytes=2 * 10**9, cost=ContextCost(131_072, 4096, 0, 100_000, 0), longest=131_072, kept=131_072,
        limit_bytes=8 * 10**9,
    )  # fmt: skip
    check_context(plan, plan.most_tokens)
    with pytest.raises(RequestError, match=rf"100,000 tokens takes 15.* 8.00 GB: {plan.most_tokens:,} tokens; --kv"):
        check_context(plan, 100_000)
    found = f"5 tokens with an answer of 99,995 takes 15.*{plan.most_tokens:,} tokens; lower max-tokens, --kv"
    with pytest.raises(RequestError, match=found):
        check_context(plan, 5, 99_995)


def test_a_model_whose_cache_cannot_shrink_is_not_advised_to(tiny_model: TinyModel) -> None:
    for model, way_out in ((tiny_model(), "--max-kv-size drops"), (make_tiny_sambay(), "shorten it$")):
        plan = replace(plan_context(model), limit_bytes=model.weights_bytes)
        with pytest.raises(RequestError, match=f"0 tokens; {way_out}"):
            check_context(plan, 100)


def test_the_context_of_phi_4_mini_flash_reasoning_at_full_size() -> None:
    """5,120 bytes a token, one layer's keys and values, and 24.2 MB whatever the length; the weights stay lazy."""
    published = {
        "model_type": "phi4flash", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
        "num_attention_heads": 40, "num_key_value_heads": 20, "vocab_size": 200_064, "sliding_window": 512,
        "max_position_embeddings": 262_144, "mb_per_layer": 2, "layer_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    model = SambaYModel(SambaYConfig.from_dict(published))
    model.set_dtype(mx.bfloat16)
    plan = plan_context(model)
    assert plan.cost.token_bytes == 2 * 20 * 64 * 2 == 5_120
    slack = 8 * WindowCache.STEP * 5_120  # of the windows, so that the tokens of a short pass can be taken back
    assert plan.cost.fixed_bytes - slack == pytest.approx(24.2e6, rel=0.01)
    grown = plan.cache_bytes(32_768) - plan.cache_bytes(16_384)
    assert grown <= 1.05 * 5_120 * 16_384
    assert plan.longest == 65_536 and plan.cache_bytes(65_536) < 0.6e9

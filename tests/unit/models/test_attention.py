"""Attention in slices of queries and in blocks of quantised keys and values equals dense attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.models.attention import attention, in_blocks, in_slices
from phi4_mlx.models.cache import KVCache
from tests.model_runs import close, peak_memory

H, K, Dh = 6, 2, 64


def inputs(T: int, S: int, B: int = 1) -> tuple[mx.array, mx.array, mx.array]:
    keys = mx.random.split(mx.random.key(0), 3)
    shapes = (B, H, T, Dh), (B, K, S, Dh), (B, K, S, Dh)
    queries, k, v = (mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True))
    return 3 * queries, k, v  # large scores, so that the maximum differs between blocks


def quantised(bits: int, keys: mx.array, values: mx.array) -> tuple[Any, Any, mx.array, mx.array]:
    """Quantised keys and values, and both dequantised to float32."""
    both = KVCache(bits).update_and_fetch(keys, values)
    exact = [
        mx.dequantize(weights, *(part.astype(mx.float32) for part in rest), group_size=64, bits=bits)
        for weights, *rest in both
    ]
    return *both, *exact


def dense(queries: mx.array, keys: mx.array, values: mx.array, mask: Any) -> mx.array:
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=Dh**-0.5, mask=mask)


SHAPES = [(1, 100), (5, 100), (100, 100), (64, 65), (1, 1)]


@pytest.mark.parametrize("rows", [1, 7, 64, 100, 1000])
@pytest.mark.parametrize(("T", "S"), SHAPES)
def test_slices_equal_dense_attention(T: int, S: int, rows: int) -> None:
    arrays = inputs(T, S)
    assert close(in_slices(*arrays, Dh**-0.5, rows), dense(*arrays, "causal"), 1e-5)


@pytest.mark.parametrize("block", [1, 7, 64, 100, 1000])
@pytest.mark.parametrize(("T", "S"), SHAPES)
def test_blocks_equal_dense_attention(T: int, S: int, block: int) -> None:
    queries, *both = inputs(T, S)
    keys, values, *exact = quantised(8, *both)
    mask = None if T == 1 else "causal"
    assert close(in_blocks(queries, keys, values, Dh**-0.5, mask, 8, block), dense(queries, *exact, mask), 2e-5)


@pytest.mark.parametrize("block", [3, 16, 64])
def test_blocks_equal_dense_attention_under_a_mask_by_sequence(block: int) -> None:
    queries, *both = inputs(1, 40, B=3)
    keys, values, *exact = quantised(4, *both)
    mask = mx.arange(40) >= mx.array([0, 17, 39])[:, None, None, None]  # some sequences see nothing of a block
    assert close(in_blocks(queries, keys, values, Dh**-0.5, mask, 4, block), dense(queries, *exact, mask), 2e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("T", "S"), [(1, 700), (40, 700), (700, 700)])
def test_attention_over_quantised_keys_and_values_equals_dense_attention(bits: int, T: int, S: int) -> None:
    queries, *both = inputs(T, S)
    keys, values, *exact = quantised(bits, *both)
    mask = None if T == 1 else "causal"
    assert close(attention(queries, keys, values, Dh**-0.5, mask, bits), dense(queries, *exact, mask), 1e-4)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.3)])
def test_the_error_of_quantised_keys_and_values_is_bounded(bits: int, most: float) -> None:
    arrays = inputs(40, 700)
    keys, values, *_ = quantised(bits, *arrays[1:])
    error = attention(arrays[0], keys, values, Dh**-0.5, "causal", bits) - dense(*arrays, "causal")
    assert math.sqrt(float(mx.mean(error.square()))) < most


def test_blocks_in_bfloat16_are_as_exact_as_bfloat16_allows() -> None:
    queries, *both = (array.astype(mx.bfloat16) for array in inputs(30, 900))
    keys, values, *exact = quantised(8, *both)
    whole = dense(queries.astype(mx.float32), *exact, "causal")
    found = in_blocks(queries, keys, values, Dh**-0.5, "causal", 8, 64)
    assert found.dtype == mx.bfloat16 and close(found.astype(mx.float32), whole, 0.03)


def peak_above(compute: Callable[[], mx.array]) -> int:
    mx.clear_cache()
    before = mx.get_active_memory()
    return peak_memory(compute) - before


@pytest.mark.slow
def test_quantised_attention_never_holds_all_scores() -> None:
    T, S = 128, 32_768
    queries, *both = inputs(T, S)
    keys, values = KVCache(4).update_and_fetch(*both)
    mx.eval(queries, keys, values)
    assert peak_above(lambda: attention(queries, keys, values, Dh**-0.5, "causal", 4)) < 4 * H * T * S / 8


@pytest.mark.slow
def test_a_long_chunk_on_the_cpu_never_holds_all_scores() -> None:
    T, S = 1024, 8_192
    arrays = inputs(T, S)
    mx.eval(arrays)
    assert mx.default_device() == mx.Device(mx.cpu)
    assert peak_above(lambda: attention(*arrays, Dh**-0.5, "causal", None)) < 4 * H * T * S / 2

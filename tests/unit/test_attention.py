"""Attention in blocks, and over quantised keys and values, equals the dense one."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.cache import KVCache
from phi4_mlx.models.attention import attention, in_blocks

H, K, Dh = 6, 2, 64


def inputs(T: int, S: int, B: int = 1, seed: int = 0) -> tuple[mx.array, mx.array, mx.array]:
    keys = mx.random.split(mx.random.key(seed), 3)
    shapes = (B, H, T, Dh), (B, K, S, Dh), (B, K, S, Dh)
    queries, k, v = (mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True))
    return 3 * queries, k, v  # sharp enough for the maximum to move from block to block


def dense(queries: mx.array, keys: mx.array, values: mx.array, mask: Any) -> mx.array:
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=Dh**-0.5, mask=mask)


def blocks(queries: mx.array, keys: mx.array, values: mx.array, mask: Any, block: int) -> mx.array:
    return in_blocks(
        queries, (keys,), (values,), Dh**-0.5, mask, lambda x, y: x @ y.swapaxes(-1, -2), mx.matmul, block
    )


@pytest.mark.parametrize("block", [1, 7, 64, 100, 1000])
@pytest.mark.parametrize(("T", "S"), [(1, 100), (5, 100), (100, 100), (64, 65), (1, 1)])
def test_blocks_equal_the_whole(T: int, S: int, block: int) -> None:
    arrays = inputs(T, S)
    mask = None if T == 1 else "causal"
    assert mx.allclose(blocks(*arrays, mask, block), dense(*arrays, mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [3, 16, 64])
def test_blocks_under_a_mask_of_their_own(block: int) -> None:
    queries, keys, values = inputs(1, 40, B=3)
    mask = mx.arange(40) >= mx.array([0, 17, 39])[:, None, None, None]  # rows that see nothing of a block
    assert mx.allclose(
        blocks(queries, keys, values, mask, block), dense(queries, keys, values, mask), rtol=0, atol=1e-5
    )


def dequantised(packed: Any, bits: int) -> mx.array:
    return mx.dequantize(*packed, group_size=64, bits=bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("T", "S"), [(1, 700), (40, 700), (700, 700)])
def test_over_quantised_keys_and_values(bits: int, T: int, S: int) -> None:
    queries, keys, values = inputs(T, S)
    packed = KVCache(bits).update_and_fetch(keys, values)
    mask = None if T == 1 else "causal"
    seen = attention(queries, *packed, Dh**-0.5, mask, bits)
    exact = dense(queries, *(dequantised(each, bits) for each in packed), mask)
    assert mx.allclose(seen, exact, rtol=0, atol=1e-4)  # what is left is the order of sums


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.3)])
def test_how_far_quantised_is_from_exact(bits: int, most: float) -> None:
    arrays = inputs(40, 700)
    packed = KVCache(bits).update_and_fetch(*arrays[1:])
    error = attention(arrays[0], *packed, Dh**-0.5, "causal", bits) - dense(*arrays, "causal")
    assert math.sqrt(float(mx.mean(error.square()))) < most


def test_half_precision_keeps_its_digits() -> None:
    arrays = [array.astype(mx.bfloat16) for array in inputs(30, 900)]
    exact = dense(*(array.astype(mx.float32) for array in arrays), "causal")
    seen = blocks(*arrays, "causal", 64)
    assert seen.dtype == mx.bfloat16 and mx.allclose(seen.astype(mx.float32), exact, rtol=0, atol=0.03)


def test_no_array_of_all_scores_stands_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    T, S = 128, 32_768
    arrays = inputs(T, S)
    packed = KVCache(4).update_and_fetch(*arrays[1:])
    mx.eval(arrays, packed)
    scores = 4 * H * T * S
    peaks = []
    for keys, values, bits in ((*packed, 4), (arrays[1], arrays[2], None)):
        monkeypatch.setattr("phi4_mlx.models.attention.WHOLE", 1)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attention(arrays[0], keys, values, Dh**-0.5, "causal", bits))
        peaks.append(mx.get_peak_memory() - before)
    assert max(peaks) < scores / 8


def test_a_long_chunk_on_the_cpu_goes_in_blocks() -> None:
    arrays = inputs(600, 8_000)
    assert mx.default_device() == mx.Device(mx.cpu)
    mx.eval(arrays)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    seen = attention(*arrays, Dh**-0.5, "causal", None)
    mx.eval(seen)
    assert mx.get_peak_memory() - before < 4 * H * 600 * 8_000 / 2
    assert mx.allclose(seen, dense(*arrays, "causal"), rtol=0, atol=1e-4)

"""Codes as MLX packs them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from phi4_mlx.convert.packing import packed, unpacked

ROWS, WIDTH, GROUP = 48, 128, 32


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_those_that_mlx_packs(bits: int) -> None:
    rows = mx.random.normal((ROWS, WIDTH), key=mx.random.key(0))
    weight, scales, biases = mx.quantize(rows, GROUP, bits)
    codes = unpacked(weight, bits)
    values = (codes.reshape(ROWS, -1, GROUP) * scales[..., None] + biases[..., None]).reshape(ROWS, WIDTH)
    assert mx.abs(values - mx.dequantize(weight, scales, biases, GROUP, bits)).max() < 1e-6
    assert codes.max() == 2**bits - 1 and mx.array_equal(packed(codes, bits), weight)

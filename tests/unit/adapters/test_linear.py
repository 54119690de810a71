"""The maths of LoRA and DoRA layers, over every kind of linear layer."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from phi4_mlx.adapters.folder import PARTS
from phi4_mlx.adapters.layers import draw_dropout
from phi4_mlx.adapters.linear import DoRALinear, LoRALinear

KINDS = ["lora", "dora"]

# base -> quantisation, dtype, allowed relative error of the output against the explicit formula in fp32
BASES: dict[str, tuple[dict[str, Any] | None, mx.Dtype, float]] = {
    "fp32": (None, mx.float32, 1e-5),
    "fp16": (None, mx.float16, 3e-3),
    "bf16": (None, mx.bfloat16, 2e-2),
    "4 bits": ({"group_size": 32, "bits": 4}, mx.float32, 1e-5),
    "3 bits": ({"group_size": 32, "bits": 3}, mx.float32, 1e-5),
    "8 bits of bf16": ({"group_size": 32, "bits": 8}, mx.bfloat16, 2e-2),
    "mxfp4": ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, mx.float32, 1e-5),
    "nvfp4": ({"group_size": 16, "bits": 4, "mode": "nvfp4"}, mx.float32, 1e-5),
    "mxfp8 of bf16": ({"group_size": 32, "bits": 8, "mode": "mxfp8"}, mx.bfloat16, 2e-2),
}


def normal(shape: tuple[int, ...], seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def dense(linear: nn.Module) -> mx.array:
    """The matrix of a layer, [out, in], in fp32."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight.astype(mx.float32)
    settings = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
    biases = linear.get("biases")
    scales = linear.scales
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(linear.weight, scales, biases, **settings).astype(mx.float32)


def effective(w: mx.array, scale: float, a: mx.array, b: mx.array, *m: mx.array) -> mx.array:
    """The effective matrix [out, in] of an adapted layer, exactly as in the papers."""
    w = w + scale * (a @ b).T
    if m:
        w = m[0][:, None] * w / mx.stop_gradient(mx.linalg.norm(w, axis=1, keepdims=True))
    return w


# --- the maths ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_the_formula_of_its_paper(base: str, kind: str, bias: bool) -> None:
    quantise, dtype, tolerance = BASES[base]
    linear: nn.Module = nn.Linear(96, 160, bias=False)
    linear.weight = normal((160, 96), 1).astype(dtype)
    if bias:
        linear.bias = normal((160,), 6).astype(dtype)
    if quantise:
        linear = nn.QuantizedLinear.from_linear(linear, **quantise)
    a, b = 0.2 * normal((96, 4), 2), 0.2 * normal((4, 160), 3)
    m = (1 + mx.abs(normal((160,), 4)),) if kind == "dora" else ()
    layer = (DoRALinear if m else LoRALinear)(linear, a, b, *m, 3.0)
    x = normal((2, 5, 96), 5).astype(dtype)
    expected = x.astype(mx.float32) @ effective(dense(linear), 3.0, a, b, *m).T
    expected = expected + linear.bias.astype(mx.float32) if bias else expected
    for training in (True, False):
        y = layer.train(training)(x)
        kept = layer.operands(mx.float32) is layer.operands(mx.float32)
        assert kept is not training  # else the graph of a training step would outlive it
        assert y.dtype == dtype
        assert mx.abs(y - expected).max() < tolerance * mx.abs(expected).max()
    assert mx.abs(linear(x) - expected).max() > 0.1 * mx.abs(expected).max()  # the adapter has an effect


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formula(kind: str) -> None:
    linear = nn.Linear(24, 40, bias=False)
    values = {"lora_a": normal((24, 4), 2), "lora_b": 0.2 * normal((4, 40), 3), "m": 1 + mx.abs(normal((40,), 4))}
    parts = [values[part] for part in PARTS[kind]]
    layer = (DoRALinear if kind == "dora" else LoRALinear)(linear, *parts, 3.0)
    x, pull = normal((7, 24), 5), normal((7, 40), 6)

    def ours(parameters: dict[str, mx.array]) -> mx.array:
        layer.update(parameters)
        return (layer(x) * pull).sum()

    def papers(parameters: dict[str, mx.array]) -> mx.array:
        w = effective(linear.weight, 3.0, *(parameters[part] for part in PARTS[kind]))
        return ((x @ w.T) * pull).sum()

    found, expected = (mx.grad(f)(dict(zip(PARTS[kind], parts, strict=True))) for f in (ours, papers))
    for part in PARTS[kind]:
        assert mx.abs(found[part] - expected[part]).max() < 1e-5 * mx.abs(expected[part]).max(), part


def test_the_norms_of_a_fresh_dora_are_those_of_the_rows() -> None:
    linear = nn.Linear(8, 2500, bias=False)  # more rows than are unpacked at a time
    fresh = DoRALinear(linear, mx.ones((8, 2)), mx.zeros((2, 2500)), None, 1.0)
    assert mx.allclose(fresh.m, mx.linalg.norm(linear.weight, axis=1), rtol=1e-6)


def test_a_row_of_zeros_stays_zero_under_dora() -> None:
    linear = nn.Linear(8, 3, bias=False)
    linear.weight = linear.weight * mx.array([[1], [0], [1]])
    y = DoRALinear(linear, mx.ones((8, 2)), mx.zeros((2, 3)), None, 1.0)(mx.ones((1, 8)))
    assert mx.array_equal(y, linear(mx.ones((1, 8))))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_small_change_of_norm_is_not_rounded_away(dtype: mx.Dtype) -> None:
    """bf16 has no value between 1 and 1.0078."""
    linear = nn.Linear(64, 64, bias=False)
    linear.weight = linear.weight.astype(dtype)
    layer = DoRALinear(linear, mx.zeros((64, 1)), mx.zeros((1, 64)), None, 1.0)
    layer.m = layer.m * 1.003
    x = normal((100, 64), 0).astype(dtype)
    exact = 1.003 * (x.astype(mx.float32) @ linear.weight.T.astype(mx.float32))
    ratio = (layer(x) * exact).sum() / mx.square(exact).sum()  # rounding of single outputs averages out
    assert abs(ratio.item() - 1) < 5e-4


# --- dropout ---


def test_dropout_keeps_the_mean() -> None:
    layer = LoRALinear(nn.Linear(64, 8, bias=False), normal((64, 4), 1), normal((4, 8), 2), 1.0, dropout=0.25)
    x = normal((1, 64), 3)
    mx.random.seed(0)
    mean = layer(mx.broadcast_to(x, (20000, 64))).mean(axis=0, keepdims=True)
    assert mx.abs(mean - layer.eval()(x)).max() < 0.03 * mx.abs(layer(x)).max()


@pytest.mark.parametrize("kind", KINDS)
def test_under_checkpointing_gradient_and_loss_use_the_same_dropout_mask(kind: str) -> None:
    model = nn.Module()
    linear = nn.Linear(24, 24, bias=False)
    model.layer = DoRALinear(linear, normal((24, 4), 1), normal((4, 24), 2), None, 1.0, dropout=0.5)
    if kind == "lora":
        model.layer = LoRALinear(linear, normal((24, 4), 1), normal((4, 24), 2), 1.0, dropout=0.5)

    def loss(x: mx.array) -> mx.array:
        return mx.square(model.layer(x)).sum()

    x, seen = normal((3, 24), 5), []
    mx.random.seed(1)
    for _ in range(3):
        draw_dropout(model)
        plain, checkpointed = mx.value_and_grad(loss)(x), mx.value_and_grad(mx.checkpoint(loss))(x)
        assert mx.array_equal(plain[0], checkpointed[0])
        assert mx.allclose(plain[1], checkpointed[1], rtol=1e-6)
        seen.append(plain[0].item())
    assert len(set(seen)) == 3  # a new draw each time
    mx.random.seed(1)
    draw_dropout(model)
    assert loss(x).item() == seen[0]

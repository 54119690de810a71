"""Adapters on a model: the maths, over every kind of base; made, switched, replaced and taken away again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.adapters.folder import PARTS
from phi4_mlx.adapters.layers import (
    DEFAULT_KEYS,
    DoRALinear,
    LoRALinear,
    adapter_layers,
    adapter_off,
    adapter_parameters,
    add_adapter,
    draw_dropout,
    load_adapter,
    remove_adapter,
)
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.models.text import Model
from tests.adapters import adapted, save_adapter, train_a_little

IDS = mx.array([[5, 6, 7, 8]])
KINDS = ["lora", "dora"]

# base -> how to quantise, dtype, relative error of the output allowed beside the explicit formula in fp32
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


def is_kept(layer: LoRALinear) -> bool:
    """True if the operands of one forward pass are those of the next."""
    return all(old is new for old, new in zip(layer.operands(mx.float32), layer.operands(mx.float32), strict=True))


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
    """The matrix [out, in] that a layer with an adapter stands for, word for word from the papers."""
    w = w + scale * (a @ b).T
    if m:
        w = m[0][:, None] * w / mx.stop_gradient(mx.linalg.norm(w, axis=1, keepdims=True))
    return w


# --- the maths ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_a_layer_is_the_formula_of_its_paper(base: str, kind: str) -> None:
    quantise, dtype, tolerance = BASES[base]
    linear: nn.Module = nn.Linear(96, 160, bias=False)
    linear.weight = normal((160, 96), 1).astype(dtype)
    if quantise:
        linear = nn.QuantizedLinear.from_linear(linear, **quantise)
    a, b = 0.2 * normal((96, 4), 2), 0.2 * normal((4, 160), 3)
    m = (1 + mx.abs(normal((160,), 4)),) if kind == "dora" else ()
    layer = (DoRALinear if m else LoRALinear)(linear, a, b, *m, 3.0)
    x = normal((2, 5, 96), 5).astype(dtype)
    expected = x.astype(mx.float32) @ effective(dense(linear), 3.0, a, b, *m).T
    for training in (True, False):
        y = layer.train(training)(x)
        assert is_kept(layer) is not training  # else the graph of a training step would outlive it
        assert y.dtype == dtype
        assert mx.abs(y - expected).max() < tolerance * mx.abs(expected).max()
    assert mx.abs(linear(x) - expected).max() > 0.1 * mx.abs(expected).max()  # the adapter counts for something


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
    linear = nn.Linear(8, 2500, bias=False)  # more rows than are looked at together
    fresh = DoRALinear(linear, mx.ones((8, 2)), mx.zeros((2, 2500)), None, 1.0)
    assert mx.allclose(fresh.m, mx.linalg.norm(linear.weight, axis=1), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 3, 4, 8])
def test_a_fresh_adapter_changes_nothing(tiny_model: Callable[..., Model], kind: str, bits: int | None) -> None:
    model = tiny_model()
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    before = model(IDS)
    add_adapter(model, kind=kind)
    assert mx.array_equal(model(IDS), before)
    train_a_little(model)
    assert mx.abs(model(IDS) - before).max() > 0.1


def test_a_row_of_zeros_stays_one_under_dora() -> None:
    linear = nn.Linear(8, 3, bias=False)
    linear.weight = linear.weight * mx.array([[1], [0], [1]])
    y = DoRALinear(linear, mx.ones((8, 2)), mx.zeros((2, 3)), None, 1.0)(mx.ones((1, 8)))
    assert mx.array_equal(y, linear(mx.ones((1, 8))))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_small_change_of_norm_is_not_rounded_away(dtype: mx.Dtype) -> None:
    """bf16 has no number between 1 and 1.0078."""
    linear = nn.Linear(64, 64, bias=False)
    linear.weight = linear.weight.astype(dtype)
    layer = DoRALinear(linear, mx.zeros((64, 1)), mx.zeros((1, 64)), None, 1.0)
    layer.m = layer.m * 1.003
    x = normal((100, 64), 0).astype(dtype)
    exact = 1.003 * (x.astype(mx.float32) @ linear.weight.T.astype(mx.float32))
    ratio = (layer(x) * exact).sum() / mx.square(exact).sum()  # rounding of single outputs averages out
    assert abs(ratio.item() - 1) < 5e-4


def test_new_values_count_at_once_although_decoding_keeps_its_operands(tiny_model: Callable[..., Model]) -> None:
    model = adapted(tiny_model())
    first = model(IDS)
    layer = adapter_layers(model)["model.layers.0.mlp.down_proj"]
    assert is_kept(layer)
    assert layer.operands(mx.float16)[0].dtype == mx.float16
    layer.lora_b = layer.lora_b + 1
    assert mx.abs(model(IDS) - first).max() > 0.1


# --- making one ---


def test_only_the_adapter_is_left_to_train(tiny_model: Callable[..., Model]) -> None:
    for kind in KINDS:
        model = tiny_model()
        nn.quantize(model, group_size=32, bits=4)
        add_adapter(model, kind=kind)
        trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
        assert trainable == adapter_parameters(model).keys()
        assert len(trainable) == 2 * 4 * len(PARTS[kind])


def test_keys_and_the_last_layers_are_chosen(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(num_hidden_layers=3)
    add_adapter(model, rank=5, keys=["self_attn.o_proj", "mlp.down_proj"], num_layers=2)
    shapes = {name: tuple(array.shape) for name, array in adapter_parameters(model).items()}
    assert shapes == {
        f"model.layers.{n}.{key}.{part}": shape
        for n in (1, 2)
        for key, width in (("self_attn.o_proj", 96), ("mlp.down_proj", 160))
        for part, shape in (("lora_a", (width, 5)), ("lora_b", (5, 96)))
    }


def test_a_seed_gives_the_same_adapter_and_another_seed_another(tiny_model: Callable[..., Model]) -> None:
    models = [tiny_model() for _ in range(3)]
    state = mx.random.state[0]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        add_adapter(model, seed=seed)
    made = [adapter_parameters(model) for model in models]
    assert mx.array_equal(mx.random.state[0], state)
    assert all(mx.array_equal(made[0][name], made[1][name]) for name in made[0])
    drawn = [array for name, array in made[0].items() if name.endswith("lora_a")]
    assert not any(mx.array_equal(made[0][n], made[2][n]) for n in made[0] if n.endswith("lora_a"))
    assert not mx.array_equal(drawn[0], drawn[-1][: drawn[0].shape[0]])
    for a in drawn:
        assert 0.9 < mx.abs(a).max().item() * a.shape[0] ** 0.5 <= 1.0001


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0.*at least 1"),
        ({"scale": 0.0}, r"scale 0\.0.*above 0"),
        ({"scale": float("nan")}, "scale nan"),
        ({"dropout": 1.0}, r"dropout 1\.0"),
        ({"dropout": -0.1}, r"dropout -0\.1"),
        ({"dropout": float("nan")}, "dropout nan"),
        ({"num_layers": 3}, "num_layers 3.*has 2"),
        ({"num_layers": 0}, "num_layers 0"),
        ({"kind": "loha"}, "'loha'.*lora and dora"),
        ({"keys": ["q_proj"]}, r"q_proj.*self_attn\.qkv_proj"),
        ({"keys": []}, r"keys \[\]"),
        ({"keys": ["mlp.down_proj", "mlp.down_proj"]}, "each once"),
    ],
)
def test_options_out_of_range_are_named(
    tiny_model: Callable[..., Model], options: dict[str, Any], message: str
) -> None:
    model = tiny_model()
    with pytest.raises(RequestError, match=message) as caught:
        add_adapter(model, **options)
    assert "\n" not in str(caught.value)
    assert not adapter_layers(model)


# --- dropout ---


def test_dropout_drops_in_training_alone_and_a_seed_repeats_it(tiny_model: Callable[..., Model]) -> None:
    model = adapted(tiny_model(), dropout=0.5)
    without = adapted(tiny_model())
    assert mx.array_equal(model(IDS), without(IDS))
    model.train()
    mx.random.seed(7)
    first, second = model(IDS), model(IDS)
    mx.random.seed(7)
    assert mx.array_equal(model(IDS), first)
    assert not mx.allclose(first, second) and not mx.allclose(first, without(IDS))


def test_dropout_keeps_the_mean() -> None:
    layer = LoRALinear(nn.Linear(64, 8, bias=False), normal((64, 4), 1), normal((4, 8), 2), 1.0, dropout=0.25)
    x = normal((1, 64), 3)
    mx.random.seed(0)
    mean = layer(mx.broadcast_to(x, (20000, 64))).mean(axis=0, keepdims=True)
    assert mx.abs(mean - layer.eval()(x)).max() < 0.03 * mx.abs(layer(x)).max()


@pytest.mark.parametrize("kind", KINDS)
def test_under_checkpointing_the_gradient_is_of_the_drops_that_the_loss_saw(kind: str) -> None:
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


# --- on, off, over, away ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantised", [False, True])
def test_switched_off_the_model_is_its_base_to_the_bit(
    tiny_model: Callable[..., Model], kind: str, quantised: bool
) -> None:
    model = tiny_model()
    if quantised:
        nn.quantize(model, group_size=32, bits=4)
    base = model(IDS)
    adapted(model, kind, dropout=0.5).train()
    with adapter_off(model):
        assert mx.array_equal(model(IDS), base)
        with adapter_off(model):
            pass
        assert mx.array_equal(model(IDS), base)
    model.eval()
    on = model(IDS)
    assert mx.abs(on - base).max() > 0.1
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError
    assert mx.array_equal(model(IDS), on)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_can_be_taken_away(tiny_model: Callable[..., Model], kind: str) -> None:
    model = tiny_model()
    before, parameters = model(IDS), tree_flatten(model.parameters())
    remove_adapter(adapted(model, kind))
    assert mx.array_equal(model(IDS), before)
    after = dict(tree_flatten(model.parameters()))
    assert len(after) == len(parameters) and all(after[name] is array for name, array in parameters)
    remove_adapter(model)  # nothing to take away
    assert mx.array_equal(model(IDS), before)


def test_one_adapter_replaces_another_without_a_second_copy_of_the_base(
    tiny_model: Callable[..., Model], tmp_path: Path
) -> None:
    model = tiny_model()
    base = dict(tree_flatten(model.parameters()))
    logits = {}
    for n, (kind, keys) in enumerate([("lora", DEFAULT_KEYS), ("dora", DEFAULT_KEYS[:1]), ("lora", DEFAULT_KEYS[2:])]):
        fresh = adapted(tiny_model(), kind, seed=n, keys=keys)
        save_adapter(fresh, tmp_path / str(n), {})
        logits[n] = fresh(IDS)
    for n in (0, 1, 2, 0):
        load_adapter(model, tmp_path / str(n))
        assert mx.array_equal(model(IDS), logits[n])
        inside = {name.replace(".linear.", "."): array for name, array in tree_flatten(model.parameters())}
        assert all(inside[name] is array for name, array in base.items())
        assert len(inside) == len(base) + len(adapter_parameters(model))
    add_adapter(model)
    with adapter_off(model):
        assert mx.array_equal(model(IDS), tiny_model()(IDS))


def test_a_refused_adapter_leaves_the_old_one_in_place(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    model = adapted(tiny_model())
    before = model(IDS)
    save_adapter(adapted(tiny_model(num_hidden_layers=3)), tmp_path, {})
    with pytest.raises(CheckpointError):
        load_adapter(model, tmp_path)
    assert mx.array_equal(model(IDS), before)


def test_a_loaded_adapter_can_be_trained_on(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    save_adapter(adapted(tiny_model(), dropout=0.25), tmp_path, {})
    model = tiny_model().train()
    load_adapter(model, tmp_path)
    layers = adapter_layers(model)
    assert all(layer.training and layer.dropout == 0.25 for layer in layers.values())
    assert {name for name, _ in tree_flatten(model.trainable_parameters())} == adapter_parameters(model).keys()
    load_adapter(model.eval(), tmp_path)
    assert not any(layer.training for layer in adapter_layers(model).values())

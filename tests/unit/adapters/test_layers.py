"""The adapter of a model: added, loaded, switched off, replaced and removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.adapters.folder import PARTS, place
from phi4_mlx.adapters.layers import (
    adapter_layers,
    adapter_off,
    adapter_parameters,
    add_adapter,
    load_adapter,
    remove_adapter,
)
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.text import Model
from tests.adapters import adapted, save_adapter, train_a_little
from tests.tiny_sambay import make_tiny_sambay

IDS = mx.array([[5, 6, 7, 8]])
KINDS = ["lora", "dora"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 3, 4, 8])
def test_a_fresh_adapter_changes_nothing(any_model: Callable[..., LanguageModel], kind: str, bits: int | None) -> None:
    model = any_model()
    if bits:
        nn.quantize(model, group_size=32, bits=bits, class_predicate=model.quantizable)
    before = model(IDS)
    add_adapter(model, kind=kind)
    assert mx.array_equal(model(IDS), before)
    train_a_little(model)
    assert mx.abs(model(IDS) - before).max() > 0.1


def test_new_values_take_effect_although_decoding_caches_its_operands(tiny_model: Callable[..., Model]) -> None:
    model = adapted(tiny_model())
    first = model(IDS)
    layer = adapter_layers(model)["model.layers.0.mlp.down_proj"]
    assert layer.operands(mx.float32) is layer.operands(mx.float32)
    assert layer.operands(mx.float16)[0].dtype == mx.float16
    layer.lora_b = layer.lora_b + 1
    assert mx.abs(model(IDS) - first).max() > 0.1


# --- adding one ---


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


def test_blocks_that_differ_are_adapted_where_they_have_the_layer() -> None:
    model = make_tiny_sambay()
    usual = {"attn.in_proj", "attn.out_proj", "attn.Wqkv", "mlp.fc1", "mlp.fc2"}
    for keys, num_layers, first, expected in (
        (None, None, 0, usual),
        (None, 1, 7, usual - {"attn.in_proj"}),
        (["attn.Wqkv", "attn.in_proj"], 3, 5, {"attn.Wqkv", "attn.in_proj"}),
        (["attn.x_proj", "attn.dt_proj"], None, 0, {"attn.x_proj", "attn.dt_proj"}),
    ):
        add_adapter(model, rank=2, keys=keys, num_layers=num_layers)
        places = [place(path) for path in adapter_layers(model)]
        assert {key for _, key in places} == expected and min(places)[0] == first
        assert all(("in_proj" in key) <= (layer % 2 == 0) and ("Wqkv" in key) <= (layer % 2) for layer, key in places)
        train_a_little(model)
        assert mx.isfinite(model(IDS)).all()
    for key in ("attn.conv1d", "attn.A_log", "attn", "self_attn.o_proj"):
        with pytest.raises(RequestError, match=rf"{key}.* must be linear layers of a block.*fc2, attn.dt_proj, attn.x"):
            add_adapter(model, keys=[key])
    with pytest.raises(RequestError, match=r"keys: num_layers 3 leaves no layer with attn\.x_proj; raise num_layers"):
        add_adapter(model, keys=["attn.Wqkv", "attn.x_proj"], num_layers=3)


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
        ({"rank": 97}, "rank 97 is out of range; no matrix to adapt has a rank above 96"),
        ({"rank": 10**9}, "rank 1,000,000,000 is out of range"),
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


# --- on, off, replaced, removed ---


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
def test_an_adapter_can_be_removed(tiny_model: Callable[..., Model], kind: str) -> None:
    model = tiny_model()
    before, parameters = model(IDS), tree_flatten(model.parameters())
    remove_adapter(adapted(model, kind))
    assert mx.array_equal(model(IDS), before)
    after = dict(tree_flatten(model.parameters()))
    assert len(after) == len(parameters) and all(after[name] is array for name, array in parameters)
    remove_adapter(model)  # nothing to remove
    assert mx.array_equal(model(IDS), before)


def test_one_adapter_replaces_another_without_a_second_copy_of_the_base(
    tiny_model: Callable[..., Model], tmp_path: Path
) -> None:
    model = tiny_model()
    base = dict(tree_flatten(model.parameters()))
    logits = {}
    every = Model.lora_keys
    for n, (kind, keys) in enumerate([("lora", every), ("dora", every[:1]), ("lora", every[2:])]):
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

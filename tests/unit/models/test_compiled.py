"""Steps of one token through compiled calls: equal to the blocks one by one, and never with weights of yesterday."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.adapters.layers import adapter_layers, adapter_off, add_adapter
from phi4_mlx.adapters.linear import DoRALinear
from phi4_mlx.models.text import Model


def step(model: Model, cache: Any, token: int = 7, plain: bool = False) -> mx.array:
    """Logits of one token that is taken back afterwards; in training blocks run one by one."""
    B = cache.ids.shape[0]
    model.train(plain)
    for _ in range(3):  # the first one with weights that are new runs plainly, and the next one where adapters fold
        logits = model(mx.full((B, 1), token, mx.int32), cache)
        mx.eval(logits)
        cache.trim(1)
    model.eval()
    return logits


def filled(model: Model, length: int = 20, B: int = 1, **options: Any) -> Any:
    cache = model.make_cache(**options)
    mx.eval(model(mx.random.randint(0, 512, (B, length), key=mx.random.key(1)), cache))
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("partial", [1.0, 0.75])
@pytest.mark.parametrize("B", [1, 3])
def test_equal_to_the_blocks_one_by_one(
    tiny_model: Callable[..., Model], quantised: bool, partial: float, B: int
) -> None:
    model = tiny_model(partial_rotary_factor=partial)
    if quantised:
        nn.quantize(model, 32, 4)
    for length in (20, 5000):
        cache = filled(model, length, B)
        assert mx.allclose(step(model, cache), step(model, cache, plain=True), rtol=0, atol=1e-5)


def test_equal_across_the_rope_boundary(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(original_max_position_embeddings=32)
    cache = filled(model, 30)
    for _ in range(5):
        logits = model(mx.array([[3]]), cache)
        whole = model(cache.ids)[:, -1:]
        assert mx.allclose(logits, whole, rtol=0, atol=1e-4)


def replace_norm(model: Model) -> None:
    model.layers[1].input_layernorm.weight = 2 * model.layers[1].input_layernorm.weight


def replace_layer(model: Model) -> None:
    model.model.layers[0] = model.layers[1]


def replace_last_norm(model: Model) -> None:
    model.model.norm = nn.RMSNorm(model.config.hidden_size, eps=0.5)


def replace_embedding(model: Model) -> None:
    model.model.embed_tokens.weight = mx.random.normal(model.model.embed_tokens.weight.shape, key=mx.random.key(5))


def update_all(model: Model) -> None:
    model.update(nn.utils.tree_map(lambda each: 1.1 * each, model.parameters()))


def quantise(model: Model) -> None:
    nn.quantize(model, 32, 4)


def put_an_adapter_on(model: Model) -> None:
    add_adapter(model, rank=4, scale=2.0)
    for layer in adapter_layers(model).values():
        layer.lora_b = mx.ones_like(layer.lora_b)


def change_epsilon(model: Model) -> None:
    model.layers[0].post_attention_layernorm.eps = 9.0


def put_an_adapter_on_some_layers(model: Model) -> None:
    add_adapter(model, num_layers=1, rank=4, scale=2.0)
    for layer in adapter_layers(model).values():
        layer.lora_b = mx.ones_like(layer.lora_b)


def quantise_some_layers(model: Model) -> None:
    nn.quantize(model.layers[1], 32, 4)


class Scaled(nn.Module):
    """A module with an array that is no parameter, and a number that is no array."""

    def __init__(self, inner: nn.Module, array: float, number: float) -> None:
        super().__init__()
        self.inner, self._array, self.number = inner, mx.array(array), number

    def __call__(self, x: mx.array) -> mx.array:
        return self.inner(x) * self._array * self.number


def scale_by_arrays(model: Model) -> None:
    for place, layer in enumerate(model.layers):
        layer.mlp = Scaled(layer.mlp, 1.0 + place, 1.0)


def scale_by_numbers(model: Model) -> None:
    for place, layer in enumerate(model.layers):
        layer.mlp = Scaled(layer.mlp, 1.0, 1.0 + place)


def change_the_scale_of_an_adapter(model: Model) -> None:
    put_an_adapter_on(model)
    mx.eval(model(mx.array([[1]])))
    for layer in adapter_layers(model).values():
        layer.scale *= 3


CHANGES = [
    replace_norm, replace_layer, replace_last_norm, replace_embedding, update_all, quantise, quantise_some_layers,
    put_an_adapter_on, put_an_adapter_on_some_layers, scale_by_arrays, scale_by_numbers, change_epsilon,
    change_the_scale_of_an_adapter,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_seen(tiny_model: Callable[..., Model], change: Callable[[Model], None]) -> None:
    model = tiny_model(num_hidden_layers=5)
    cache = filled(model)
    before = step(model, cache)
    change(model)
    after, plain = step(model, cache), step(model, cache, plain=True)
    assert mx.allclose(after, plain, rtol=0, atol=1e-5) and not mx.allclose(after, before, rtol=0, atol=1e-3)


@pytest.mark.parametrize("quantised", [False, True])
def test_what_is_written_into_an_array_in_place_is_seen(tiny_model: Callable[..., Model], quantised: bool) -> None:
    model = tiny_model()
    if quantised:
        nn.quantize(model, 32, 4)
    cache = filled(model)
    before = step(model, cache)
    for name, array in tree_flatten(model.parameters()):
        if array.dtype == mx.uint32:
            array[:] = mx.random.randint(0, 2**31, array.shape, key=mx.random.key(4)).astype(mx.uint32)
        else:
            array *= -1.5
        logits = model(mx.array([[7]]), cache)  # a single step: the first one after it
        cache.trim(1)
        plain = step(model, cache, plain=True)
        assert mx.allclose(logits, plain, rtol=1e-4, atol=1e-4) and not mx.allclose(logits, before, atol=1e-4), name
        before = logits


def test_a_copy_of_a_model_that_has_decoded(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    logits = step(model, filled(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert mx.array_equal(step(twin, filled(twin)), logits)
        replace_norm(twin)
        assert not mx.allclose(step(twin, filled(twin)), logits, atol=1e-3)
    assert mx.array_equal(step(model, filled(model)), logits)


def test_an_adapter_switched_off_is_off(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    cache = filled(model)
    base = step(model, cache)
    put_an_adapter_on(model)
    adapted = step(model, cache)
    with adapter_off(model):
        assert mx.array_equal(step(model, cache), base)
    assert mx.array_equal(step(model, cache), adapted) and not mx.array_equal(adapted, base)


def test_gradients_flow_through_a_single_token(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    cache = filled(model)
    step(model, cache)

    def loss(model: Model) -> mx.array:
        return model(mx.array([[7]]), cache).square().sum()

    gradients = []
    for training in (False, True):
        model.train(training)
        _, gradient = nn.value_and_grad(model, loss)(model)
        gradients.append(gradient["model"]["layers"][0]["mlp"]["down_proj"]["weight"])
        mx.eval(gradients)
        cache.trim(1)
    assert mx.abs(gradients[1]).max() > 0 and mx.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_adapters_fold_once_for_all_steps(tiny_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(num_hidden_layers=5)
    add_adapter(model, kind="dora")
    cache = filled(model)
    step(model, cache)
    monkeypatch.setattr(DoRALinear, "_fold", None)
    step(model, cache)

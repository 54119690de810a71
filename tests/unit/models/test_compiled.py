"""Compiled single-token steps equal uncompiled blocks, and follow every change of weights and modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.adapters.layers import adapter_layers, adapter_off, add_adapter
from phi4_mlx.adapters.linear import DoRALinear
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.text import Model
from tests.conftest import TinyModel
from tests.model_runs import close, filled_cache, random_ids


def step(model: Model, cache: PromptCache, plain: bool = False) -> mx.array:
    """Logits of token 7, which is trimmed afterwards; `plain` runs uncompiled blocks, as in training."""
    B = cache.ids.shape[0]
    model.train(plain)
    for _ in range(3):  # with new weights the first step runs uncompiled, and with new adapters the second one too
        logits = model(mx.full((B, 1), 7, mx.int32), cache)
        mx.eval(logits)
        cache.trim(1)
    model.eval()
    return logits


def filled(model: Model, length: int = 20, B: int = 1) -> PromptCache:
    return filled_cache(model, random_ids(length, B=B))


@pytest.mark.slow
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("partial", [1.0, 0.75])
@pytest.mark.parametrize("B", [1, 3])
def test_compiled_steps_equal_uncompiled_blocks(tiny_model: TinyModel, quantised: bool, partial: float, B: int) -> None:
    model = tiny_model(partial_rotary_factor=partial)
    if quantised:
        nn.quantize(model, 32, 4)
    for length in (20, 5000):
        cache = filled(model, length, B)
        assert close(step(model, cache), step(model, cache, plain=True), 1e-5)


def test_compiled_steps_are_exact_across_the_rope_boundary(tiny_model: TinyModel) -> None:
    model = tiny_model(original_max_position_embeddings=32)
    cache = filled(model, 30)
    for _ in range(5):
        logits = model(mx.array([[3]]), cache)
        assert close(logits, model(cache.ids)[:, -1:])


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
    """A module with an array outside its parameters, and with a plain number."""

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
def test_the_next_steps_follow_a_change_of_the_model(tiny_model: TinyModel, change: Callable[[Model], None]) -> None:
    model = tiny_model(num_hidden_layers=5)
    cache = filled(model)
    before = step(model, cache)
    change(model)
    after, plain = step(model, cache), step(model, cache, plain=True)
    assert close(after, plain, 1e-5) and not close(after, before, 1e-3)


@pytest.mark.parametrize("quantised", [False, True])
def test_the_first_step_follows_an_array_changed_in_place(tiny_model: TinyModel, quantised: bool) -> None:
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
        logits = model(mx.array([[7]]), cache)  # one step only: the first one after the change
        cache.trim(1)
        plain = step(model, cache, plain=True)
        assert mx.allclose(logits, plain, rtol=1e-4, atol=1e-4) and not mx.allclose(logits, before, atol=1e-4), name
        before = logits


def test_copies_of_a_model_that_has_decoded_are_independent(tiny_model: TinyModel) -> None:
    model = tiny_model()
    logits = step(model, filled(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert mx.array_equal(step(twin, filled(twin)), logits)
        replace_norm(twin)
        assert not mx.allclose(step(twin, filled(twin)), logits, atol=1e-3)
    assert mx.array_equal(step(model, filled(model)), logits)


def test_steps_follow_an_adapter_that_is_switched_off_and_on(tiny_model: TinyModel) -> None:
    model = tiny_model()
    cache = filled(model)
    base = step(model, cache)
    put_an_adapter_on(model)
    adapted = step(model, cache)
    with adapter_off(model):
        assert mx.array_equal(step(model, cache), base)
    assert mx.array_equal(step(model, cache), adapted) and not mx.array_equal(adapted, base)


def test_gradients_flow_through_a_single_token_step(tiny_model: TinyModel) -> None:
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


def test_adapters_are_not_folded_again_at_every_step(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(num_hidden_layers=5)
    add_adapter(model, kind="dora")
    cache = filled(model)
    step(model, cache)
    monkeypatch.setattr(DoRALinear, "_fold", None)  # a call would raise
    step(model, cache)

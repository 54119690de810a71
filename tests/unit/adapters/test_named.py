"""Adapters by name: rows under different ones in one forward pass, each as under that adapter alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.adapters.folder import Adapter
from phi4_mlx.adapters.layers import adapter_off, add_adapter, current_adapter, put_adapter
from phi4_mlx.adapters.quantized import dense, quantized
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.models import differential, text
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.model import LanguageModel
from tests.adapters import adapted
from tests.conftest import make_tiny_model
from tests.kinds import MAKERS
from tests.model_runs import close, filled_cache, random_ids

Make = Callable[..., Any]


def plain(make: Make) -> Any:
    return make(seed=3)


def four_bits(make: Make) -> Any:
    model = make(seed=3)
    nn.quantize(model, 32, 4, class_predicate=model.quantizable)
    return model


DECODERS = ["phi3", pytest.param("phi4flash", marks=pytest.mark.slow)]  # phi4mm has that of phi3
BASES = {"dense": plain, "4 bits": four_bits}


def made(make: Make, kind: str, **options: Any) -> Adapter:
    """An adapter that changes the logits."""
    return current_adapter(adapted(make(seed=3), kind, **options), kind)


def adapters_of(make: Make) -> dict[str, Adapter]:
    """LoRA, DoRA, another rank and scale, one layer only, and 8 bits."""
    key = "mlp.fc2" if make is MAKERS["phi4flash"] else "mlp.down_proj"
    return {
        "lora": made(make, "lora", seed=1),
        "dora": made(make, "dora", seed=2),
        "other rank": made(make, "lora", seed=3, rank=7, scale=3.0),
        "last layer": made(make, "lora", seed=4, num_layers=1, keys=[key], scale=9.0),
        "8 bits": quantized(made(make, "lora", seed=5, rank=5)),
        "more 8 bits": quantized(made(make, "lora", seed=6, rank=3)),
        "second dora": made(make, "dora", seed=7, rank=2),
    }


@pytest.fixture(params=DECODERS)
def make(request: pytest.FixtureRequest) -> Make:
    return MAKERS[request.param]


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest, make: Make) -> LanguageModel:
    model: LanguageModel = BASES[request.param](make)
    for name, adapter in adapters_of(make).items():
        model.adapters.add(name, adapter)
    return model


def batch_cache(model: LanguageModel, prompts: list[mx.array], names: list[str | None]) -> BatchCache:
    """A cache of rows under these adapters."""
    cache, rows = model.make_batch_cache(model.regime(8)), []
    for prompt, name in zip(prompts, names, strict=True):
        rows.append(model.make_cache())
        rows[-1].adapter = name
        mx.eval(model(prompt, rows[-1]))
    cache.join(rows)
    return cache


def batch_logits(model: LanguageModel, prompts: list[mx.array], names: list[str | None], steps: int = 4) -> mx.array:
    """Logits [B, steps, V] of rows under these adapters, over the same next tokens."""
    cache = batch_cache(model, prompts, names)
    following = random_ids(steps, seed=9, B=len(prompts))
    return mx.concatenate([model(following[:, n : n + 1], cache) for n in range(steps)], axis=1)


def prompts(count: int) -> list[mx.array]:
    return [random_ids(5 + n % 3, seed=n) for n in range(count)]


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("name", ["lora", "dora", "8 bits"])
def test_an_adapter_by_name_is_the_adapter_put_on_a_base_of_any_quantisation(mode: str, name: str) -> None:
    named, put = (make_tiny_model(seed=3) for _ in range(2))
    for model in (named, put):
        nn.quantize(model, 32, mode=mode, class_predicate=model.quantizable)
    adapter = adapters_of(MAKERS["phi3"])[name]
    named.adapters.add(name, adapter)
    put_adapter(put, dense(adapter))
    cache = named.make_cache()
    cache.adapter = name
    assert close(named(random_ids(7), cache), put(random_ids(7)))


def test_rows_under_different_adapters_are_each_as_under_its_own(make: Make, base: LanguageModel) -> None:
    given = adapters_of(make)
    names: list[str | None] = [None, *given, None, "lora"]
    mixed = batch_logits(base, prompts(len(names)), names)
    for n, name in enumerate(names):
        model = BASES["4 bits" if isinstance(base.head, nn.QuantizedEmbedding) else "dense"](make)
        if name is not None:
            put_adapter(model, dense(given[name]))
        cache = filled_cache(model, prompts(len(names))[n])
        following = random_ids(4, seed=9, B=len(names))[n : n + 1]
        alone = mx.concatenate([model(following[:, k : k + 1], cache) for k in range(4)], axis=1)
        assert close(mixed[n : n + 1], alone), name
        if name is not None:
            base_cache = filled_cache(base, prompts(len(names))[n])
            assert not close(alone[:, :1], base(following[:, :1], base_cache)), f"{name} changes nothing"


def test_rows_without_an_adapter_are_the_base_to_the_bit(base: LanguageModel) -> None:
    names: list[str | None] = [None, "lora", "dora", None, "8 bits", "more 8 bits", None]
    rows = [n for n, name in enumerate(names) if name is None]
    mixed = batch_logits(base, prompts(len(names)), names)
    alone = batch_logits(base, prompts(len(names)), [None] * len(names))
    assert mx.array_equal(mixed[mx.array(rows)], alone[mx.array(rows)])
    assert not mx.array_equal(mixed, alone)


def test_one_adapter_for_all_rows_needs_no_mask_and_none_needs_no_copies(base: LanguageModel) -> None:
    assert base.adapters is not None
    assert base.adapters.select([None, None]) is None
    one = base.adapters.select(["dora", "dora"])
    assert one is not None and not one.rows.given
    assert one is base.adapters.select(["dora"])
    several = base.adapters.select(["dora", None])
    assert several is one and all(mask.shape[:2] == (2, 1) for mask in several.rows.given)


def test_switched_off_they_leave_the_base(base: LanguageModel) -> None:
    names: list[str | None] = ["lora", "dora", None]
    with adapter_off(base):
        off = batch_logits(base, prompts(3), names)
    assert mx.array_equal(off, batch_logits(base, prompts(3), [None] * 3))
    assert not mx.array_equal(off, batch_logits(base, prompts(3), names))


def test_they_are_no_parameters_of_the_model_and_are_read_at_first_use() -> None:
    model, reads = make_tiny_model(), []
    names = [name for name, _ in tree_flatten(model.parameters())]

    def read() -> Adapter:
        reads.append(1)
        return made(make_tiny_model, "lora")

    model.adapters.add("one", read)
    assert model.adapters.names == ["one"]
    model.adapters.select([None])
    assert not reads
    for _ in range(2):
        model.adapters.load("one")
        model.adapters.select(["one", None])
    assert len(reads) == 1
    assert [name for name, _ in tree_flatten(model.parameters())] == names


def count_calls(patch: pytest.MonkeyPatch, kind: str) -> list[int]:
    """Counts the calls of a block's Python code; a compiled step makes none."""
    calls: list[int] = []
    owner: Any = differential.Attention if kind == "phi4flash" else text.Attention
    heads = owner.heads

    def counting(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        return heads(self, *arguments)

    patch.setattr(owner, "heads", counting)
    return calls


@pytest.mark.parametrize("kind", DECODERS)
def test_a_step_is_traced_once_for_a_set_of_adapters_whatever_the_rows(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = MAKERS[kind](seed=3)
    given = adapters_of(MAKERS[kind])
    for name in ("lora", "dora"):
        model.adapters.add(name, given[name])
    sets: list[list[str | None]] = [[None, "lora", "dora"], ["dora", "lora", "lora"], [None, None, None]]
    mixed, others, base = (batch_cache(model, prompts(3), names) for names in sets)
    ids = random_ids(1, B=3)

    def step(cache: Any) -> int:
        calls.clear()
        mx.eval(model(ids, cache))
        return len(calls)

    calls = count_calls(monkeypatch, kind)
    for _ in range(2):  # notes the modules, then traces them
        assert step(mixed)
    assert not step(mixed) and not step(others)  # other masks, the same trace
    for _ in range(2):
        assert step(base)
    assert not step(base) and not step(mixed)
    model.adapters.add("lora", given["other rank"])  # another adapter of that name
    for _ in range(2):
        assert step(others)
    assert not step(others) and not step(mixed) and not step(base)


def test_an_adapter_may_be_replaced_and_removed() -> None:
    model = make_tiny_model()
    first, second = made(make_tiny_model, "lora", seed=1), made(make_tiny_model, "dora", seed=2)
    model.adapters.add("one", first)
    before = batch_logits(model, prompts(2), ["one", None])
    model.adapters.add("one", second)
    after = batch_logits(model, prompts(2), ["one", None])
    assert mx.array_equal(before[1], after[1]) and not close(before[0], after[0])
    model.adapters.remove("one")
    with pytest.raises(RequestError, match="adapter 'one' is unknown; this model has none"):
        model.adapters.select(["one"])


def test_a_set_that_is_no_longer_ready_leaves_nothing_behind() -> None:
    model = make_tiny_model()
    for seed, name in enumerate("abcdefg"):
        model.adapters.add(name, made(make_tiny_model, "lora", seed=seed))
    found = model.adapters.select(["a", "b"])
    batch_logits(model, prompts(2), ["a", "b"], steps=3)  # with traces
    left = weakref.ref(found)
    del found
    assert left() is not None
    for name in "cdefg":  # more sets than are kept
        model.adapters.select(["a", name])
    assert left() is None


def test_new_weights_of_the_base_are_seen() -> None:
    model = make_tiny_model()
    model.adapters.add("one", made(make_tiny_model, "lora"))
    names: list[str | None] = ["one", None]
    before = batch_logits(model, prompts(2), names)
    model.model.layers[0].mlp.down_proj.weight = 2 * model.model.layers[0].mlp.down_proj.weight
    in_place = batch_logits(model, prompts(2), names)
    model.model.layers[0].mlp.down_proj = nn.Linear(160, model.config.hidden_size, bias=False)
    other_layer = batch_logits(model, prompts(2), names)
    for one, other in ((before, in_place), (in_place, other_layer)):
        assert not close(one[0], other[0]) and not close(one[1], other[1])


def test_joined_quantised_matrices_take_memory_once() -> None:
    model = make_tiny_model(hidden_size=192, intermediate_size=320)
    for n, name in enumerate("abc"):
        adapter = current_adapter(adapted(make_tiny_model(hidden_size=192, intermediate_size=320), seed=n, rank=64), "")
        adapter = quantized(adapter)
        model.adapters.add(name, adapter)
        nbytes = sum(array.nbytes for array in adapter.tensors.values())
        del adapter
        model.adapters.load(name)
    mx.clear_cache()
    before = mx.get_active_memory()
    model.adapters.select(["a", "b", "c"])
    assert mx.get_active_memory() - before < nbytes // 8
    one = model.adapters.select(["b"])
    assert one is not None and mx.get_active_memory() - before < nbytes // 8


def test_an_adapter_that_changes_nothing_is_refused_where_it_must_be_trained() -> None:
    new = make_tiny_model()
    add_adapter(new)
    fresh = current_adapter(new, "somewhere")
    for adapter in (fresh, quantized(fresh)):
        model = make_tiny_model()
        model.adapters.add("vision", adapter, trained=True)
        with pytest.raises(CheckpointError, match="somewhere: lora_b is zero in all 8 layers of adapter 'vision'"):
            model.adapters.load("vision")
        model.adapters.add("vision", adapter)
        model.adapters.load("vision")


def test_adapters_that_do_not_fit_are_refused_at_their_first_use() -> None:
    model = make_tiny_model()
    model.adapters.add("wide", made(lambda seed: make_tiny_model(seed=seed, hidden_size=192), "lora"))
    model.adapters.add("good", made(make_tiny_model, "lora"))
    with pytest.raises(CheckpointError, match="the adapter is for another model"):
        model.adapters.select(["good", "wide"])
    assert model.adapters.select(["good"]) is not None
    whole = replace(current_adapter(make_tiny_model(), "somewhere"), kind="full")
    model.adapters.add("whole", whole)
    with pytest.raises(RequestError, match=r"somewhere: .*whole weights"):
        model.adapters.load("whole")
    with pytest.raises(RequestError, match="'good' cannot be used together with the one that the model was loaded"):
        adapted(model).adapters.load("good")

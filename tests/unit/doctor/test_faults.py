"""A fault in each fast path is found by name, on any device, and is gone without the path."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn
import pytest

from phi4_mlx.doctor.check import Check, run_check
from phi4_mlx.doctor.checks import all_checks
from phi4_mlx.doctor.devices import Device, devices
from phi4_mlx.generation import steps, stream
from phi4_mlx.lora.training import loss
from phi4_mlx.models import attention, differential, padded, safe, scan
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.cache import KVCache
from phi4_mlx.models.compiled import Traced
from phi4_mlx.models.safe import FastPath, without
from phi4_mlx.models.state import WindowCache

Plant = Callable[[pytest.MonkeyPatch], None]


def scaled(owner: Any, name: str) -> Plant:
    """A fault: every number that a function returns is half as large again."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(owner, name)

        def wrong(*arguments: Any, **options: Any) -> Any:
            found = right(*arguments, **options)
            return found * 1.5 if isinstance(found, mx.array) else type(found)(each * 1.5 for each in found)

        monkeypatch.setattr(owner, name, wrong)

    return plant


def replaced(owner: Any, name: str, wrong: Callable[..., Any]) -> Plant:
    """A fault: a function that does something else."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, wrong)


def failing(owner: Any, name: str) -> Plant:
    """A fault: a function that raises what MLX would raise."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[METAL] Command buffer execution failed")

    return replaced(owner, name, fail)


def unmasked(cache: KVCache, N: int) -> str | None:
    """A mask of later chunks that lets a token see those after it."""
    return None if N == 1 or cache.offset else "causal"


def unpadded(cache: BatchCache, N: int) -> str | None:
    """A mask of rows that lets a short one see the columns before it."""
    return None if N == 1 else "causal"


def compiled_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Traced.on

    def on(traced: Traced, *modules: nn.Module) -> Callable[..., Any]:
        call = right(traced, *modules)
        return lambda *arrays: tuple(1.1 * each for each in call(*arrays))

    monkeypatch.setattr(Traced, "on", on)


def padded_with_others(x: mx.array, width: int) -> mx.array:
    return mx.concatenate([x, x[..., : width - x.shape[-1]]], axis=-1)


def recomputed_wrongly(layer: nn.Module) -> Callable[..., Any]:
    def run(x: mx.array, *arguments: Any) -> Any:
        return layer(1.1 * x, *arguments)

    return run


def unwired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(stream, "memory_limit", lambda: 2**30)
    failing(mx, "set_wired_limit")(monkeypatch)


PLANTS: list[tuple[FastPath, str, Plant]] = [
    ("attention", "attention, float32", scaled(mx.fast, "scaled_dot_product_attention")),
    ("attention", "demo: logits of a whole prompt", scaled(mx.fast, "scaled_dot_product_attention")),
    ("blocks", "attention over 4-bit keys in blocks, float16", scaled(attention, "in_blocks")),
    ("blocks", "demo: keys and values in 8 bits", scaled(attention, "in_blocks")),
    ("buffers", "caches that grow", scaled(KVCache, "_written")),
    ("buffers", "caches that grow", scaled(WindowCache, "_written")),
    ("buffers", "demo: steps", scaled(KVCache, "_written")),
    ("chunks", "demo: prompt in chunks", replaced(KVCache, "make_mask", unmasked)),
    ("compiled", "demo: steps", compiled_wrongly),
    ("compiled", "demo-flash: steps", compiled_wrongly),
    ("loss", "demo: LoRA step and its gradient", scaled(loss, "_with_frozen_head")),
    ("loss", "loss with a trained head", scaled(loss, "_with_trained_head")),
    ("norms", "norms, float32", scaled(mx.fast, "rms_norm")),
    ("norms", "norms, bfloat16", scaled(mx.fast, "layer_norm")),
    ("padding", "attention of padded heads, float32", replaced(padded, "pad", padded_with_others)),
    ("products", "4-bit product, float32", scaled(mx, "quantized_matmul")),
    ("products", "8-bit product, bfloat16", scaled(mx, "quantized_matmul")),
    ("products", "audio tower", scaled(mx, "quantized_matmul")),
    ("products", "demo-multimodal: clip and its adapter", scaled(mx, "quantized_matmul")),
    ("queue", "demo: tokens guessed ahead", failing(mx, "async_eval")),
    ("queue", "demo: across the RoPE boundary", failing(mx, "async_eval")),
    ("recompute", "demo: LoRA step and its gradient", replaced(nn.utils, "checkpoint", recomputed_wrongly)),
    ("rope", "rope, float16", scaled(mx.fast, "rope")),
    ("rope", "demo: across the RoPE boundary", scaled(mx.fast, "rope")),
    ("rows", "demo: rows of several lengths", replaced(BatchCache, "make_mask", unpadded)),
    ("scan", "selective scan and its gradient", scaled(scan, "_scan")),
    ("scan", "demo-flash: logits of a whole prompt", scaled(scan, "_scan")),
    ("slices", "attention in slices", scaled(attention, "in_slices")),
    ("slices", "differential attention", replaced(differential, "_trained", lambda slices, seen: lambda *a: a[0] * 0)),
    ("speculation", "demo: tokens guessed ahead", replaced(steps._Passes, "take_back", lambda passes, n: None)),
    ("speculation", "demo: rows of several lengths", replaced(BatchCache, "take_back", lambda cache, counts: None)),
    ("wired", "demo: wired memory", unwired),
]

SLOW = re.compile("LoRA|rows")
CASES = [
    pytest.param(*plant, marks=[pytest.mark.slow] if SLOW.search(plant[1]) else [], id=f"{plant[0]}: {plant[1]}")
    for plant in PLANTS
]


@cache
def checks() -> dict[str, Check]:
    return {check.name: check for check in all_checks()}


@pytest.mark.parametrize(("path", "name", "plant"), CASES)
def test_a_fault_is_found_by_name(path: FastPath, name: str, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    outcome = run_check(checks()[name], devices())
    assert not outcome["passed"]
    assert outcome["switch_off"] == [path]
    with without(path):
        assert run_check(checks()[name], devices())["passed"]


def faulty(plant: Plant) -> Device:
    """The CPU as a second device, on which a path is wrong."""

    @contextlib.contextmanager
    def use() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            plant(monkeypatch)
            yield

    return Device("gpu", use)


@pytest.mark.parametrize(("path", "name", "plant"), CASES[::5])
def test_a_fault_on_the_gpu_alone_is_found_by_name(path: FastPath, name: str, plant: Plant) -> None:
    both = [*devices()[:1], faulty(plant)]
    outcome = run_check(checks()[name], both)
    assert not outcome["passed"]
    assert outcome["switch_off"] == [path]
    with without(path):
        assert run_check(checks()[name], both)["passed"]


def test_a_fault_without_a_twin_has_no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check("sum", (), lambda: [mx.exp(mx.ones(3))], checks()["norms, float32"].tolerance)
    outcome = run_check(check, [*devices()[:1], faulty(scaled(mx, "exp"))])
    assert outcome["devices"] == pytest.approx(0.5) and outcome["twins"] is None
    assert not outcome["passed"] and outcome["switch_off"] == []


def test_every_path_has_a_plant_and_a_check() -> None:
    assert {path for path, _, _ in PLANTS} == {*get_args(FastPath)}
    assert {path for check in checks().values() for path in check.paths} == {*get_args(FastPath)}


def test_names_of_checks_are_unique() -> None:
    names = [check.name for check in all_checks()]
    assert len({*names}) == len(names)


class Asked(frozenset[FastPath]):
    """Fast paths that are off, namely none; notes which ones a computation asks for."""

    paths: set[object]

    def __contains__(self, path: object) -> bool:
        self.paths.add(path)
        return False


@pytest.mark.slow
def test_a_check_lists_each_path_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    monkeypatch.setattr(safe, "_off", asked)
    for check in checks().values():
        asked.paths = set()
        mx.eval(list(check.compute()))
        assert asked.paths <= {*check.paths}, check.name
        assert len({*check.paths}) == len(check.paths), check.name

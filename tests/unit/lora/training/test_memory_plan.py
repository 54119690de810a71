"""The memory plan: predicted peaks equal measured ones, and a refusal names settings that fit."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from phi4_mlx.adapters.layers import add_adapter
from phi4_mlx.data.samples import Pair, Sample
from phi4_mlx.errors import RequestError
from phi4_mlx.lora.saving.run_folder import RunFolder
from phi4_mlx.lora.settings import Settings
from phi4_mlx.lora.training.batches import Batch, Batches
from phi4_mlx.lora.training.loss import sft_loss
from phi4_mlx.lora.training.memory_plan import Growth, Plan, check_memory, make_plan
from phi4_mlx.lora.training.trainer import Trainer
from phi4_mlx.models.text import Model
from tests.kinds import MAKERS

WIDE = {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config", "checkpointing", "rows", "width"),
    [
        ("phi3", {"num_hidden_layers": 4}, False, 4, 512),
        ("phi3", {"num_hidden_layers": 8}, True, 2, 1024),
        ("phi3", {"vocab_size": 50_000}, False, 2, 640),
        ("phi3", {"vocab_size": 50_000, "num_hidden_layers": 8}, True, 8, 300),
        ("phi3", WIDE, False, 1, 1024),
        ("phi4flash", {}, True, 4, 512),
        ("phi4flash", {"sliding_window": 64, "mamba_d_state": 16}, False, 1, 1024),
    ],
)
def test_the_predicted_peak_is_within_a_tenth(
    kind: str, config: dict[str, Any], checkpointing: bool, rows: int, width: int
) -> None:
    model = MAKERS[kind](max_position_embeddings=4096, original_max_position_embeddings=4096, **config)
    add_adapter(model, rank=8)
    model.train()
    model.recompute = checkpointing
    predicted = make_plan(model, sft_loss, {(width,) * rows}).peak_bytes((width,) * rows)
    ids = mx.random.randint(0, 512, (rows, width), key=mx.random.key(1))
    ones = mx.ones((rows, width), mx.int32)
    mx.eval(ids, ones)
    mx.clear_cache()
    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(model, sft_loss)(model, Batch(ids, ids, ones > 0, ones)))
    assert predicted == pytest.approx(mx.get_peak_memory(), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rank", "accumulation", "rows", "options"),
    [
        ("lora", 64, 1, 1, {}),
        ("lora", 64, 3, 1, {}),
        ("dora", 64, 1, 1, {}),
        ("full", 0, 1, 1, {}),
        ("full", 0, 2, 1, {}),
        ("full", 0, 1, 8, {"vocab_size": 4000, "num_hidden_layers": 1}),
    ],
)
def test_the_predicted_peak_of_a_real_step_counts_the_optimizer_and_the_sums(
    tiny_model: Callable[..., Model], tmp_path: Path, kind: str, rank: int, accumulation: int, rows: int,
    options: dict[str, Any],
) -> None:  # fmt: skip
    gc.collect()
    model = tiny_model(**{"intermediate_size": 512, "num_hidden_layers": 4} | WIDE | options)
    if kind == "full":
        model.unfreeze()
    else:
        add_adapter(model, rank=rank, kind=kind)
    draw = random.Random(1)
    samples = [Sample(draw.choices(range(512), k=65), [False] + [True] * 64, "x:1") for _ in range(4 * rows)]
    batches = Batches(samples, batch_size=rows, max_seq_length=64)
    settings = Settings(batch_size=rows, grad_accumulation_steps=accumulation, max_seq_length=64)
    trainer = Trainer(model, batches, settings, RunFolder(tmp_path, len(model.layers)))
    plan = make_plan(model.train(), trainer.loss, batches.shapes(), accumulation > 1)
    mx.clear_cache()
    mx.reset_peak_memory()
    trainer._step()
    assert batches.shapes() == {(64 * rows,)}
    assert plan.peak_bytes((64 * rows,)) == pytest.approx(mx.get_peak_memory(), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packing", [True, False])
def test_the_predicted_peak_of_packed_samples_is_near(
    tiny_model: Callable[..., Model], checkpointing: bool, packing: bool
) -> None:
    """Attention has the scores of the stretches, not those of the whole row."""
    model = tiny_model(max_position_embeddings=4096, original_max_position_embeddings=4096, num_hidden_layers=4)
    add_adapter(model, rank=8)
    model.train()
    model.recompute = checkpointing
    draw = random.Random(1)
    samples = [Sample(draw.choices(range(512), k=n), [False] + [True] * (n - 1), "x:1") for n in (900, 700, 300, 90)]
    batches = Batches(samples, packing=packing)
    (shape,) = batches.shapes()
    assert len(shape) == (3 if packing else 4) and max(shape) == (899 if packing else 912)
    predicted = make_plan(model, sft_loss, batches.shapes()).peak_bytes(shape)
    batch = next(batches)
    mx.clear_cache()
    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(model, sft_loss)(model, batch))
    # With recomputation, a block frees the scores of a stretch before it takes the next; the plan adds them up.
    assert 0.9 <= predicted / mx.get_peak_memory() <= (1.25 if packing and checkpointing else 1.1)


def test_a_plan_counts_the_samples_that_there_are() -> None:
    """Three short samples are a batch, whatever --batch-size says."""
    plan = Plan(0, Growth(0, 1e6, 0), Growth(0, 2e6, 0), 0)
    samples = [Sample([1] * 11, [False] + [True] * 10, "x:1")] * 3
    batches = Batches(samples, batch_size=8, max_seq_length=512)
    assert check_memory(plan, batches, limit=10**8) == plan.peak_bytes((30,))


def test_the_advice_on_pairs_counts_each_answer() -> None:
    plan = Plan(0, Growth(0, 1e6, 0), Growth(0, 2e6, 0), 0)
    sample = Sample([1] * 801, [False] + [True] * 800, "x:1")
    batches = Batches([Pair(sample, sample)] * 2, batch_size=4, max_seq_length=1024)
    with pytest.raises(RequestError, match=r"3,200 tokens needs 6\.40 GB.*; --batch-size 1 or --max-seq-length 448"):
        check_memory(plan, batches, limit=3600 * 10**6)


def test_growth_goes_through_its_measurements() -> None:
    true = Growth(1000.0, 20.0, 0.5)
    found = Growth.fit(2, 64, *(round(true.at(shape)) for shape in ((64,) * 2, (64,) * 4, (32,) * 4)))
    assert (found.constant, found.token, found.pair) == pytest.approx((1000, 20, 0.5))


def test_what_cannot_fit_is_refused_with_a_setting_that_would() -> None:
    plan = Plan(10**9, Growth(0, 1e5, 0), Growth(0, 1e6, 0), 0)
    small = Plan(10**9, Growth(0, 1e4, 0), Growth(0, 1e5, 0), 0)

    def check(plan: Plan, rows: int, width: int, other: Plan | None, limit: int) -> None:
        samples = [Sample([1] * (width + 1), [False] + [True] * width, "x:1")] * (3 * rows)
        batches = Batches(samples, batch_size=rows, packing=False)
        check_memory(plan, batches, None if other is None else lambda: other, limit)

    check(plan, 4, 1024, small, 6 * 10**9)
    with pytest.raises(RequestError, match=r"a batch of 8,192 tokens needs 9\.19 GB.* has 6\.00 GB") as caught:
        check(plan, 4, 2048, small, 6 * 10**9)
    message = str(caught.value)
    assert "--grad-checkpoint" in message and "--batch-size 2" in message and "--max-seq-length 1216" in message
    assert plan.peak_bytes((2048,) * 2) <= 6 * 10**9 and plan.peak_bytes((1216,) * 4) <= 6 * 10**9
    with pytest.raises(RequestError, match="a smaller model"):
        check(plan, 1, 64, None, 10**9)
    with pytest.raises(RequestError) as caught:
        check(plan, 4, 2048, plan, 6 * 10**9)  # running blocks again would not be enough
    assert "--grad-checkpoint" not in str(caught.value)
    from phi4_mlx.models.machine import memory_limit

    assert memory_limit() > 10**9

"""A batch computed in parts: the numbers of one evaluation, no more memory, and progress that never falls."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

from phi4_mlx.adapters.layers import adapter_layers, add_adapter
from phi4_mlx.data.samples import Pair, Sample
from phi4_mlx.lora.training.batches import Batch, Batches
from phi4_mlx.lora.training.gradients import mean_gradients
from phi4_mlx.lora.training.loss import CHUNK_ROWS, Loss, sft_loss
from phi4_mlx.lora.training.milestones import milestones
from phi4_mlx.lora.training.preference import PreferenceLoss
from phi4_mlx.lora.training.trainer import evaluate
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.text import Model

Ticks = list[tuple[float, float]]


def sample(n: int, first: int) -> Sample:
    return Sample([(3 * first + i) % 500 for i in range(n)], [False] * (n // 2) + [True] * (n - n // 2), f"x:{first}")


def batches(pairs: bool) -> list[Batch]:
    lengths = (9, 70, 300, 20)
    if pairs:
        return [*Batches([Pair(sample(n, k), sample(n, k + 50)) for k, n in enumerate(lengths)], batch_size=2).fixed()]
    return [*Batches([sample(n, k) for k, n in enumerate(lengths)], batch_size=2).fixed()]


def tuned(make: Callable[..., Model], kind: str, **config: Any) -> Model:
    """A model in training, with an adapter that has an effect."""
    model = make(**config)
    if kind == "full":
        return model.train()
    add_adapter(model, rank=4, kind=kind)
    for layer in adapter_layers(model).values():
        layer.lora_b = 0.03 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    return model.train()


def at_once(model: Model, loss: Loss, given: list[Batch]) -> tuple[float, dict[str, mx.array]]:
    """Mean loss and gradients of all batches, each evaluated in one call."""
    total, targets, sums = mx.array(0.0), mx.array(0), None
    for batch in given:
        (mean, n), grads = nn.value_and_grad(model, loss)(model, batch)
        if len(given) == 1:
            mx.eval(mean, grads)
            return mean.item(), dict(tree_flatten(grads))
        grads = tree_map(lambda grad, n=n: grad.astype(mx.float32) * n, grads)
        sums = grads if sums is None else tree_map(mx.add, sums, grads)
        total, targets = total + mean * n, targets + n
        mx.eval(total, targets, sums)
    return total.item() / targets.item(), dict(tree_flatten(tree_map(lambda grad: grad / targets, sums)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "task", "count", "recompute", "tied"),
    [("lora", "sft", 1, False, True), ("lora", "sft", 2, True, False), ("dora", "sft", 1, True, True),
     ("full", "sft", 2, False, True), ("full", "sft", 1, False, False), ("lora", "dpo", 1, False, True),
     ("lora", "orpo", 2, False, True)],
)  # fmt: skip
def test_the_parts_give_the_numbers_of_one_evaluation_to_the_bit(
    any_model: Callable[..., LanguageModel], kind: str, task: str, count: int, recompute: bool, tied: bool
) -> None:
    model = tuned(any_model, kind, tie_word_embeddings=tied)
    model.recompute = recompute
    loss: Loss = sft_loss if task == "sft" else PreferenceLoss(task)
    given = batches(task != "sft")[:count]
    expected, gradients = at_once(model, loss, given)
    ticks: Ticks = []
    found, _, grads = mean_gradients(model, loss, iter(given), count, None, lambda *tick: ticks.append(tick))
    assert found == expected and model.watch is None
    for name, grad in tree_flatten(grads):
        assert mx.array_equal(grad, gradients[name]), name
    in_order(ticks, count)
    assert len(ticks) >= count * (2 * len(model.layers) + 2)


def in_order(ticks: Ticks, count: int) -> None:
    """Progress from 0 to `count` that rises, each time to what was announced."""
    done = [now for now, _ in ticks]
    assert done[0] == 0 and done[-1] == count and done == sorted(done)
    for (now, following), (then, _) in pairwise(ticks):
        assert now <= following <= count and then in (pytest.approx(following), now)  # a new batch begins where it was


def test_a_validation_moves_within_its_batches_and_keeps_its_loss(tiny_model: Callable[..., Model]) -> None:
    model, given, ticks = tuned(tiny_model, "lora").eval(), batches(False), []
    sums = [sft_loss(model, batch) for batch in given]
    expected = sum((mean * n for mean, n in sums), start=mx.array(0.0)) / sum(n for _, n in sums)
    assert evaluate(model, given, sft_loss, tick=lambda *tick: ticks.append(tick)) == pytest.approx(expected.item())
    in_order(ticks, len(given))
    assert len(ticks) > len(given) * len(model.layers)


def test_the_head_moves_by_chunks_of_its_rows(tiny_model: Callable[..., Model]) -> None:
    model, long = tuned(tiny_model, "lora"), [sample(8 * CHUNK_ROWS, 1)]
    with milestones(model) as passed:
        sft_loss(model, next(Batches(long, batch_size=1)))
    assert len(passed.outputs) == len(model.layers) + 4


def test_parts_take_no_more_memory(tiny_model: Callable[..., Model]) -> None:
    model = tuned(tiny_model, "lora", num_hidden_layers=6)
    (batch,) = Batches([sample(400, n) for n in range(4)], batch_size=4).fixed()
    peaks = []
    for run in (lambda: at_once(model, sft_loss, [batch]), lambda: mean_gradients(model, sft_loss, iter([batch]), 1)):
        run()
        mx.clear_cache()
        mx.reset_peak_memory()
        run()
        peaks.append(mx.get_peak_memory())
    assert peaks[1] <= 1.02 * peaks[0]

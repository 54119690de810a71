"""The mean loss and gradient of a step, over its batches and over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from phi4_mlx.adapters.layers import draw_dropout
from phi4_mlx.lora.progress import Tick, no_tick
from phi4_mlx.lora.training.batches import Batch
from phi4_mlx.lora.training.loss import Loss
from phi4_mlx.lora.training.milestones import milestones
from phi4_mlx.lora.training.processes import Group, all_sum
from phi4_mlx.models.model import LanguageModel

Gradients = Callable[[LanguageModel, Loss, Iterator[Batch], int, Group | None, Tick], tuple[float, int, Any]]
"""The signature of `mean_gradients`, so that a trainer can be given another one, such as a compiled one."""


def mean_gradients(
    model: LanguageModel,
    loss: Loss,
    batches: Iterator[Batch],
    count: int,
    group: Group | None = None,
    tick: Tick = no_tick,
) -> tuple[float, int, Any]:
    """Mean loss and gradient over several batches, in which each target has the same weight.

    Args:
        model: in training mode, with the parameters to train unfrozen.
        loss: the loss of a batch.
        batches: the batches of this process.
        count: number of batches to take.
        group: the processes that train together; None for this one alone.
        tick: called with the progress.

    Returns:
        (mean loss in nats, number of targets or pairs, gradients as a tree in the dtypes of the parameters)
    """
    value_and_grad = nn.value_and_grad(model, loss)
    if count == 1 and group is None:
        draw_dropout(model)
        with milestones(model) as passed:
            (mean, n), grads = value_and_grad(model, next(batches))
        passed.evaluate([mean, n], grads, tick)
        return mean.item(), int(n.item()), grads
    total, targets, sums = mx.array(0.0), mx.array(0), None
    for done in range(count):
        draw_dropout(model)
        with milestones(model) as passed:
            (mean, n), grads = value_and_grad(model, next(batches))
        # In fp32: the sum over a few thousand targets overflows fp16.
        grads = tree_map(lambda grad, n=n: grad.astype(mx.float32) * n, grads)
        sums = grads if sums is None else tree_map(mx.add, sums, grads)
        del grads
        total, targets = total + mean * n, targets + n
        passed.evaluate([total, targets], sums, tick, done)
    total, targets = all_sum(total, group), all_sum(targets, group)
    sums = tree_map(lambda grad: all_sum(grad, group), sums)
    weight = mx.maximum(targets, 1)
    grads = tree_map(lambda grad, p: (grad / weight).astype(p.dtype), sums, model.trainable_parameters())
    mx.eval(total, targets, grads)
    return total.item() / max(int(targets.item()), 1), int(targets.item()), grads

"""Milestones of a batch: arrays on the way to its results, computed one after the other, so that progress shows.

MLX computes nothing before it is asked, and then all at once: a large batch would be a single call of minutes, in which
nothing moves and no signal is handled. The operations are the same in parts, and so are the numbers, to the bit; the
next part is queued before the last one is waited for, so the device does not idle.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phi4_mlx.adapters.folder import place
from phi4_mlx.lora.progress import Tick
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.queued import queue

_Part = tuple[float, list[mx.array]]
"""(work: bytes of weights times tokens, arrays)"""


class Milestones:
    """The arrays that a model passes while a batch's graph is built, in the order of their computation.

    Args:
        model: the model.

    Attributes:
        outputs: (work, the output in a list) of each; work is bytes of weights times tokens.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._head = model.head
        self._head_work = 2 * _nbytes(model.head)  # for the logits, and for their gradient
        self._layer_work = {id(layer): _nbytes(layer) for layer in model.layers}
        self.outputs: list[_Part] = []
        self._backward_work = 0.0
        self._passes = 2 if model.recompute else 1  # of a block in backward

    def add(self, module: nn.Module, output: mx.array) -> None:
        """Adds an output of a block, [B, T, D], or of the head's loss, [N]; the `watch` of a model."""
        tokens = prod(output.shape[:2])
        work = tokens * (self._head_work if module is self._head else self._layer_work.get(id(module), 0))
        self.outputs.append((work, [output]))
        self._backward_work += 0 if module is self._head else self._passes * work

    def evaluate(self, results: list[mx.array], grads: Any, tick: Tick, before: float = 0) -> None:
        """Computes a batch, and forgets its milestones.

        Args:
            results: arrays that follow the forward pass, such as the loss.
            grads: a tree of gradients by the parameters' paths; {} for none.
            tick: called before the first part and after each.
            before: number of batches that were done before.
        """
        parts = [*self.outputs, (0, results), *_backward(grads, self._backward_work)]
        total, done = sum(work for work, _ in parts) or 1.0, 0.0
        tick(before, before + parts[0][0] / total)
        parts.reverse()
        self.outputs = []  # or no part could be freed before the end
        work, waiting = parts.pop()
        queue(waiting)
        while parts:
            following, arrays = parts.pop()
            queue(arrays)
            mx.eval(waiting)
            done += work
            tick(before + done / total, before + (done + following) / total)
            work, waiting = following, arrays
        mx.eval(waiting)
        tick(before + 1, before + 1)


def _backward(grads: Any, work: float) -> list[_Part]:
    """The gradients layer by layer, the last one first, and at the end those of other weights; all share the work."""
    by_layer: dict[int, list[mx.array]] = defaultdict(list)
    for name, grad in tree_flatten(grads):
        by_layer[place(name)[0]].append(grad)
    return [(work / len(by_layer), by_layer[layer]) for layer in sorted(by_layer, reverse=True)]


@contextlib.contextmanager
def milestones(model: LanguageModel) -> Iterator[Milestones]:
    """Records the milestones of the graphs that are built in the block."""
    found = Milestones(model)
    model.watch = found.add
    try:
        yield found
    finally:
        model.watch = None


def _nbytes(module: nn.Module) -> int:
    return sum(int(array.nbytes) for _, array in tree_flatten(module.parameters()))

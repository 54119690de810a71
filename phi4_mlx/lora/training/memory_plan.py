"""A memory plan: the predicted peak of a run, extrapolated from small batches before it starts.

The peak of a step is either in the loss, on top of the activations that forward has saved, or in backward. Saved bytes
and the peak of backward are each the sum of a constant, a part per token, and a part per pair of tokens where attention
keeps its scores; three small batches with few targets give the three. The loss is measured alone.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phi4_mlx.errors import RequestError
from phi4_mlx.lora.training.batches import Batch, Batches, Shape
from phi4_mlx.lora.training.loss import Loss, token_losses
from phi4_mlx.models.machine import memory_limit
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.terminal.amount import amount, size

PROBE_TOKENS = 512  # of a probe, unless the largest batch has fewer
MEASUREMENTS = 5  # of a plan
HEAD_PROBE_TARGETS = 2048  # more targets do not raise the peak of the loss


@dataclass(frozen=True)
class Growth:
    """Bytes that grow with a batch: constant, and for each stretch of `width` tokens token * width + pair * width^2."""

    constant: float
    token: float
    pair: float

    @classmethod
    def fit(cls, rows: int, width: int, one: int, two: int, split: int) -> Growth:
        """Fits the three parts to three measurements.

        Args:
            rows: rows of the first batch.
            width: tokens in each of them.
            one: bytes of the first batch.
            two: bytes of twice as many rows.
            split: bytes of twice as many rows, half as wide.
        """
        pair = max(0.0, 2 * (one - split) / (rows * width**2))
        token = (two - one) / (rows * width) - pair * width
        return cls(one - rows * (token * width + pair * width**2), token, pair)

    def at(self, shape: Shape) -> float:
        """Bytes of a batch of a shape."""
        return self.constant + sum(self.token * width + self.pair * width**2 for width in shape)


@dataclass(frozen=True)
class Plan:
    """Bytes of memory that a step takes.

    Attributes:
        resident: weights, adapter and optimizer state, always in memory.
        saved: activations that forward saves for backward.
        backward: the peak of backward.
        loss: the peak of the loss, above the saved activations.
        sums: the summed gradients of earlier batches, if a step has several.
        update: the peak of the optimizer's update: the gradients and temporary arrays.
        token_s: seconds that the small batches took for a token.
    """

    resident: int
    saved: Growth
    backward: Growth
    loss: int
    sums: int = 0
    update: int = 0
    token_s: float = 0.0

    def peak_bytes(self, shape: Shape) -> int:
        """The predicted peak of a step, in bytes, with a batch of a shape."""
        batch = max(self.saved.at(shape) + self.loss, self.backward.at(shape))
        return self.resident + round(max(batch + self.sums, self.update))


def make_plan(
    model: LanguageModel,
    loss: Loss,
    shapes: Collection[Shape],
    accumulating: bool = False,
    measured: Callable[[int], object] = lambda number: None,
) -> Plan:
    """Measures loss and gradient of a few small batches, and fits a plan to them.

    Args:
        model: in training mode, with the parameters to train unfrozen; the optimizer's state exists already.
        loss: the loss to minimise.
        shapes: of the batches to come.
        accumulating: True if a step sums the gradients of several batches or processes.
        measured: called with the number of each measurement of the `MEASUREMENTS` before it is made.

    Returns:
        The plan, in bytes.
    """
    trained = [array for _, array in tree_flatten(model.trainable_parameters())]
    sums = 4 * sum(array.size for array in trained) if accumulating else 0  # fp32
    grads = sum(array.nbytes for array in trained)
    most = max(map(sum, shapes))
    width = min(max(map(max, shapes)), PROBE_TOKENS)
    rows = -(-min(most, PROBE_TOKENS) // width)
    measured(1)
    _probe(model, loss, 1, width)  # the first run compiles and allocates what stays
    mx.clear_cache()
    resident = mx.get_active_memory()
    probes = ((rows, width), (2 * rows, width), (2 * rows, width // 2))
    begin = time.perf_counter()
    found = []
    for number, probe in enumerate(probes, 2):
        measured(number)
        found.append(_probe(model, loss, *probe))
    saved, peaks = zip(*found, strict=True)
    token_s = (time.perf_counter() - begin) / sum(rows * width for rows, width in probes)
    measured(MEASUREMENTS)
    return Plan(
        resident,
        Growth.fit(rows, width, *(each - resident for each in saved)),
        Growth.fit(rows, width, *(each - resident for each in peaks)),
        _loss_bytes(model, most),
        sums,
        grads + max(grads, 3 * max(array.nbytes for array in trained)),  # AdamW: three temporaries of one tensor
        token_s,
    )


def check_memory(
    plan: Plan,
    batches: Batches,
    checkpointed: Callable[[], Plan] | None = None,
    limit: int | None = None,
    *,
    resumed: bool = False,
) -> int:
    """Refuses a run that does not fit in memory, and names settings that would.

    Args:
        plan: the memory of a step.
        batches: the batches to come.
        checkpointed: makes the plan under gradient checkpointing; None if `plan` is that one.
        limit: bytes available; None for the machine's limit.
        resumed: True for a resumed run, whose batches must stay as they are.

    Returns:
        The predicted peak in bytes.

    Raises:
        RequestError: the predicted peak is above the limit.
    """
    limit = memory_limit() if limit is None else limit
    needed, worst = max((plan.peak_bytes(shape), shape) for shape in batches.shapes())
    if needed <= limit:
        return needed
    ways = [] if resumed else _ways(plan, batches, limit)
    if checkpointed is not None:
        other = checkpointed()
        if other.peak_bytes(worst) <= limit:
            ways.insert(0, "--grad-checkpoint, at a third more time,")
        elif not ways and not resumed:
            ways = [f"--grad-checkpoint with {way}" for way in _ways(other, batches, limit)]
    advice = " or ".join(ways) or ("a new run" if resumed else "a smaller model, or one of fewer bits,")
    raise RequestError(
        f"a batch of {amount(sum(worst), 'token')} needs {size(needed)}, and this machine has {size(limit)} for it; "
        f"{advice} would {'fit' if ways else 'need less'}"
    )


def _ways(plan: Plan, batches: Batches, limit: int) -> list[str]:
    """The largest smaller batch size, and the largest smaller length, whose predicted peak is within the limit."""

    def fits(**cut: int) -> bool:
        return max(map(plan.peak_bytes, batches.shapes(**cut))) <= limit

    world, longest = batches.world, batches.max_seq_length
    fewer = _largest(lambda n: fits(batch_size=n * world), (batches.batch_size - 1) // world)
    shorter = _largest(lambda n: fits(max_seq_length=64 * n), (longest - 1) // 64)
    ways = {f"--batch-size {fewer * world}": fewer, f"--max-seq-length {64 * shorter}": shorter}
    return [way for way, found in ways.items() if found]


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, if all smaller ones do; 0 if none does."""
    return bisect_left(range(1, most + 1), True, key=lambda n: not fits(n))


def _probe(model: LanguageModel, loss: Loss, rows: int, width: int) -> tuple[int, int]:
    """(bytes in memory after forward, peak of backward) of a batch with one target in each half of a row."""
    ids = mx.broadcast_to(mx.arange(width, dtype=mx.int32) % model.config.vocab_size, (rows, width))
    position = mx.arange(width)
    segments = mx.broadcast_to(mx.where(position < width // 2, 1, 2), (rows, width))  # two, like a pair of answers
    mask = mx.broadcast_to((position == width // 2 - 1) | (position == width - 1), (rows, width))
    mx.eval(ids, segments, mask)
    mx.clear_cache()
    mx.reset_peak_memory()
    (value, _), grads = nn.value_and_grad(model, loss)(model, Batch(ids, ids, mask, segments))
    mx.eval(value)
    saved = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(grads)
    return saved, mx.get_peak_memory()


def _loss_bytes(model: LanguageModel, most: int) -> int:
    """Bytes that the chunked loss of up to `most` targets adds at its peak."""
    head = model.head
    trained = head.trainable_parameters()
    # Each chunk of a trained head makes a gradient of the head's size; several are in memory at the same time.
    count = min(most, HEAD_PROBE_TARGETS if trained else PROBE_TOKENS)
    hidden = mx.zeros((count, model.config.hidden_size), model.dtype)
    targets = mx.zeros((count,), mx.int32)

    def loss(hidden: mx.array, weights: Any) -> mx.array:
        head.update(weights)
        return token_losses(model, hidden, targets).sum()

    mx.eval(hidden, targets)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(loss, (0, 1) if trained else 0)(hidden, trained))
    head.update(trained)
    return int(mx.get_peak_memory() - before)

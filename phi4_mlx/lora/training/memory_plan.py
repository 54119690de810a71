"""What a run will take, before it starts: measured on narrow rows, and carried on to the real ones.

The peak of a step is either in the loss, which stands on what forward has saved, or in backward. Saved bytes and
backward's peak are each a constant, a part for each token, and a part for each pair of tokens where attention keeps its
scores: three small batches with hardly a target give the three. The loss is measured alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phi4_mlx.errors import RequestError
from phi4_mlx.generation.memory import memory_limit
from phi4_mlx.lora.data.batches import Batch, Batches
from phi4_mlx.lora.training.loss import token_losses
from phi4_mlx.lora.training.trainer import Loss
from phi4_mlx.models.model import LanguageModel

PROBE_TOKENS = 512  # in the widest row of a probe
HEAD_PROBE_TARGETS = 2048  # with more, no more is in memory at a time


@dataclass(frozen=True)
class Growth:
    """Bytes that grow with a batch: constant + rows * (token * width + pair * width^2)."""

    constant: float
    token: float
    pair: float

    @classmethod
    def fit(cls, rows: int, width: int, one: int, two: int, split: int) -> Growth:
        """From three measurements: of `rows` rows, of twice as many, and of twice as many half as wide."""
        pair = max(0.0, 2 * (one - split) / (rows * width**2))
        token = (two - one) / (rows * width) - pair * width
        return cls(one - rows * (token * width + pair * width**2), token, pair)

    def at(self, rows: int, width: int) -> float:
        """The bytes of a batch."""
        return self.constant + rows * (self.token * width + self.pair * width**2)


@dataclass(frozen=True)
class Plan:
    """What a step will take, in bytes.

    Attributes:
        resident: weights, adapter and optimizer, which are there all the time.
        saved: what forward leaves for backward.
        backward: the peak of backward.
        loss: the peak of the loss, above what is saved.
        sums: the gradients of the batches before, where a step is several.
        update: what the optimizer takes for a step: the gradient, and what is made of it on the way.
    """

    resident: int
    saved: Growth
    backward: Growth
    loss: int
    sums: int = 0
    update: int = 0

    def peak_bytes(self, rows: int, width: int) -> int:
        """The predicted peak of a step with rows of that many tokens."""
        batch = max(self.saved.at(rows, width) + self.loss, self.backward.at(rows, width))
        return self.resident + round(max(batch + self.sums, self.update))


def make_plan(
    model: LanguageModel, loss: Loss, shapes: Collection[tuple[int, int]], accumulating: bool = False
) -> Plan:
    """Runs a few small batches through loss and gradient, and fits a plan to what they take.

    Args:
        model: with what is to be trained unfrozen, and in training mode; the optimizer's state is there already.
        loss: what will be minimised.
        shapes: (rows, tokens in each) of the batches to come.
        accumulating: whether a step is more than one batch, or more than one process: their gradients are summed.
    """
    trained = [array for _, array in tree_flatten(model.trainable_parameters())]
    sums = 4 * sum(array.size for array in trained) if accumulating else 0  # fp32
    grads = sum(array.nbytes for array in trained)
    width = min(max(width for _, width in shapes), PROBE_TOKENS)
    rows = -(-PROBE_TOKENS // width)
    _probe(model, loss, 1, width)  # the first run compiles, and makes what stays
    mx.clear_cache()
    resident = mx.get_active_memory()
    probes = ((rows, width), (2 * rows, width), (2 * rows, width // 2))
    saved, peaks = zip(*(_probe(model, loss, *probe) for probe in probes), strict=True)
    return Plan(
        resident,
        Growth.fit(rows, width, *(each - resident for each in saved)),
        Growth.fit(rows, width, *(each - resident for each in peaks)),
        _loss_bytes(model, max(rows * width for rows, width in shapes)),
        sums,
        grads + max(grads, 3 * max(array.nbytes for array in trained)),  # as measured: AdamW makes three arrays of one
    )


def check_memory(
    plan: Plan, batches: Batches, checkpointed: Callable[[], Plan] | None = None, limit: int | None = None
) -> int:
    """The predicted peak of a run; refuses one that cannot fit, and names the settings that would.

    Args:
        plan: what a step takes.
        batches: the batches to come.
        checkpointed: makes the plan under gradient checkpointing; None where this one is.
        limit: bytes that there are; None for what the machine has.

    Raises:
        RequestError: the predicted peak is above the limit.
    """
    limit = memory_limit() if limit is None else limit
    needed, rows, width = max((plan.peak_bytes(*shape), *shape) for shape in batches.shapes)
    if needed <= limit:
        return needed
    ways = _ways(plan, batches, rows, width, limit)
    if checkpointed is not None:
        other = checkpointed()
        if other.peak_bytes(rows, width) <= limit:
            ways.insert(0, "--grad-checkpoint, at a third more time,")
        elif not ways:
            ways = [f"--grad-checkpoint with {way}" for way in _ways(other, batches, rows, width, limit)]
    advice = " or ".join(ways) or "a smaller model, or one of fewer bits,"
    raise RequestError(
        f"{rows} rows of {width:,} tokens need {needed / 1e9:.1f} GB, and this machine has {limit / 1e9:.1f} GB for it;"
        f" {advice} would {'fit' if ways else 'need less'}"
    )


def _ways(plan: Plan, batches: Batches, rows: int, width: int, limit: int) -> list[str]:
    """The largest settings whose own predicted peak is within the limit."""
    fewer = (n for n in range(rows - 1, 0, -1) if plan.peak_bytes(n, width) <= limit)
    # Shorter rows may be more of them: as many as the batch has room for.
    shorter = (w for w in range(width - width % 64, 63, -64) if w < width and plan.peak_bytes(batches.rows, w) <= limit)
    ways = [f"--batch-size {n * batches.world}" for n in list(fewer)[:1]]
    return ways + [f"--max-seq-length {w // batches.samples_in_a_pair}" for w in list(shorter)[:1]]


def _probe(model: LanguageModel, loss: Loss, rows: int, width: int) -> tuple[int, int]:
    """(bytes there after forward, peak of backward) of a batch with one target in each half of a row."""
    ids = mx.broadcast_to(mx.arange(width, dtype=mx.int32) % model.config.vocab_size, (rows, width))
    position = mx.arange(width)
    segments = mx.broadcast_to(mx.where(position < width // 2, 1, 2), (rows, width))  # two, as a pair of answers is
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
    """The peak of the chunked loss of many targets, but no more than there will be, above what is there."""
    head = model.head
    trained = head.trainable_parameters()
    # Each chunk of a trained head makes a gradient of its size, and some of them are in memory together.
    count = min(most, HEAD_PROBE_TARGETS) if trained else PROBE_TOKENS
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
    return mx.get_peak_memory() - before

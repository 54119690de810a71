"""Next-token cross-entropy that never keeps the logits of a whole batch in memory.

Logits in fp32 take 800 KB per token in Phi-4-mini, and the obvious code keeps four such arrays. Here the head runs on a
few hidden states at a time. With a frozen head, the forward pass already computes the gradient with respect to the
hidden states, so the logits of a chunk are freed with it; with a trained head, backward runs the chunks again. The head
runs on targets only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from phi4_mlx.lora.training.batches import Batch
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.safe import safe

Loss = Callable[[LanguageModel, Batch], tuple[mx.array, mx.array]]
"""(model, batch) -> (mean loss in nats, number of targets or pairs that it is the mean of)"""

CHUNK_ROWS = 32  # 26 MB of fp32 logits at the vocabulary of Phi-4-mini
TRAINED_CHUNK_ROWS = 256  # larger, since each chunk adds to a gradient of the size of the head


def sft_loss(model: LanguageModel, batch: Batch) -> tuple[mx.array, mx.array]:
    """Cross-entropy of the targets of packed rows; a `Loss`."""
    return next_token_loss(model, batch.inputs, batch.targets, batch.mask, batch.segments)


def next_token_loss(
    model: LanguageModel, inputs: mx.array, targets: mx.array, mask: mx.array, segments: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy over the targets of a batch; differentiable.

    Args:
        model: the model; its head may be frozen, trained, tied or quantised.
        inputs: token ids, integers [B, T].
        targets: the token after each input, integers [B, T].
        mask: True for targets that count, bool [B, T]; evaluated at once.
        segments: number of the sample of each token in a packed row, integers [B, T]; see `LanguageModel.hidden`.

    Returns:
        (mean loss in nats, fp32 []; number of targets that count, int32 []); 0 and 0 if none counts.
    """
    hidden = model.hidden(inputs, segments=segments)  # [B, T, D]
    rows = np.flatnonzero(np.array(mask))
    if not rows.size:
        return mx.array(0.0), mx.array(0)
    chosen = mx.array(rows.astype(np.int32))
    losses = token_losses(model, hidden.reshape(-1, hidden.shape[-1])[chosen], targets.reshape(-1)[chosen])
    return losses.mean(), mx.array(rows.size)


def token_losses(model: LanguageModel, hidden: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy of the tokens that follow some hidden states; differentiable.

    Args:
        model: the model; only its head runs.
        hidden: hidden states [N, D].
        targets: the token after each, integers [N].

    Returns:
        Losses in nats, fp32 [N].
    """
    head = model.head
    trained = dict(tree_flatten(head.trainable_parameters()))

    def passed(losses: mx.array) -> None:
        if model.watch is not None:
            model.watch(head, losses)

    if safe("loss"):
        losses, _ = _loss_and_slope(model.logits(hidden), targets)
        passed(losses)
        return losses
    if trained:
        return _with_trained_head(model.logits, head, trained, hidden, targets, passed)
    return _with_frozen_head(model.logits, hidden, targets, passed)


def _with_frozen_head(
    logits: Callable[[mx.array], mx.array], hidden: mx.array, targets: mx.array, passed: Callable[[mx.array], None]
) -> mx.array:
    def forward(hidden: mx.array) -> tuple[mx.array, mx.array]:
        losses: list[mx.array] = []
        slopes: list[mx.array] = []
        for rows, labels in _chunks(hidden, targets, size=CHUNK_ROWS):
            if losses:  # one chunk after the other, so that only one has its logits in memory
                rows = mx.depends(rows, [losses[-1], slopes[-1]])
            loss, slope = _loss_and_slope(logits(rows), labels)
            _, (slope,) = mx.vjp(logits, [rows], [slope])  # from the logits to the hidden states
            losses.append(loss)
            passed(loss)
            slopes.append(slope)
        return mx.concatenate(losses), mx.concatenate(slopes)

    def backward(primals: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
        slope = outputs[1]
        return (cotangents[0][:, None] * slope).astype(slope.dtype)  # a row's loss depends on its own row only

    losses_and_slopes = mx.custom_function(forward)
    losses_and_slopes.vjp(backward)
    return losses_and_slopes(hidden)[0]


def _with_trained_head(
    logits: Callable[[mx.array], mx.array],
    head: nn.Module,
    trained: dict[str, mx.array],
    hidden: mx.array,
    targets: mx.array,
    passed: Callable[[mx.array], None],
) -> mx.array:
    names = list(trained)

    def chunk_losses(rows: mx.array, labels: mx.array, *weights: mx.array) -> mx.array:
        before = head.trainable_parameters()
        head.update(tree_unflatten(list(zip(names, weights, strict=True))))
        try:
            return _loss_and_slope(logits(rows), labels)[0]
        finally:
            head.update(before)

    def forward(hidden: mx.array, *weights: mx.array) -> mx.array:
        found: list[mx.array] = []
        for rows, labels in _chunks(hidden, targets, size=TRAINED_CHUNK_ROWS):
            if found:
                rows = mx.depends(rows, [found[-1]])
            found.append(chunk_losses(rows, labels, *weights))
            passed(found[-1])
        return mx.concatenate(found)

    def backward(primals: list[mx.array], cotangent: mx.array, output: mx.array) -> list[mx.array]:
        hidden, *weights = primals
        slopes: list[mx.array] = []
        sums = [mx.zeros_like(weight) for weight in weights]
        for rows, labels, part in _chunks(hidden, targets, cotangent, size=TRAINED_CHUNK_ROWS):
            if slopes:
                rows = mx.depends(rows, [slopes[-1], *sums])
            inputs = [rows, *weights]
            _, (slope, *more) = mx.vjp(lambda r, *w, labels=labels: chunk_losses(r, labels, *w), inputs, [part])
            sums = [total + new for total, new in zip(sums, more, strict=True)]
            slopes.append(slope)
        return [mx.concatenate(slopes), *sums]

    losses = mx.custom_function(forward)
    losses.vjp(backward)
    return losses(hidden, *trained.values())


def _chunks(*arrays: mx.array, size: int) -> Iterator[tuple[mx.array, ...]]:
    """The same rows of all arrays, some at a time."""
    return (tuple(array[at : at + size] for array in arrays) for at in range(0, len(arrays[0]), size))


def _loss_and_slope(logits: mx.array, labels: mx.array) -> tuple[mx.array, mx.array]:
    """Cross-entropy, fp32 [N], and its gradient with respect to the logits, [N, V] in their dtype."""
    exact = logits.astype(mx.float32)
    log_sum = mx.logsumexp(exact, axis=-1, keepdims=True)
    loss = (log_sum - mx.take_along_axis(exact, labels[:, None], axis=-1))[:, 0]
    ones = mx.ones((len(labels), 1))
    slope = mx.put_along_axis(
        mx.exp(exact - log_sum),
        labels[:, None],
        mx.exp(-loss)[:, None] - ones,
        axis=-1,
    )
    return loss, slope.astype(logits.dtype)

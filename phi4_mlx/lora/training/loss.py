"""Next-token cross-entropy without the logits of the whole row in memory.

The vocabulary is what makes training large: logits in fp32 take 800 KB a token in Phi-4-mini, and the obvious code
keeps four such arrays. Here the head runs on a few rows at a time. Where it is frozen, the gradient with respect to the
hidden states is taken on the spot, in the forward pass, so that no logits outlive their chunk; where it is trained,
backward runs the chunks again. Positions that are no target cost no head at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from phi4_mlx.models.model import LanguageModel

CHUNK_ROWS = 32  # 26 MB of fp32 logits at the vocabulary of Phi-4-mini
TRAINED_CHUNK_ROWS = 256  # each chunk adds to a gradient as large as the head: fewer chunks


def next_token_loss(
    model: LanguageModel, inputs: mx.array, targets: mx.array, mask: mx.array, segments: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy over the targets of a batch; differentiable.

    Args:
        model: the model; its head may be frozen, trained, tied or quantised.
        inputs: token ids [B, T].
        targets: the token that follows each, [B, T].
        mask: which targets count, [B, T]; it is looked at before anything is computed.
        segments: the samples of packed rows, [B, T]; see `LanguageModel.hidden`.

    Returns:
        (mean loss in nats, number of targets that count), both scalars; 0 and 0 where none counts.
    """
    hidden = model.hidden(inputs, segments=segments)  # [B, T, D]
    rows = np.flatnonzero(np.array(mask))
    if not rows.size:
        return mx.array(0.0), mx.array(0)
    chosen = mx.array(rows.astype(np.int32))
    losses = token_losses(model, hidden.reshape(-1, hidden.shape[-1])[chosen], targets.reshape(-1)[chosen])
    return losses.mean(), mx.array(rows.size)


def token_losses(model: LanguageModel, hidden: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy in nats of hidden states [N, D] and the tokens [N] that follow: [N] in fp32; differentiable."""
    trained = dict(tree_flatten(model.head.trainable_parameters()))
    if trained:
        return _with_trained_head(model.logits, model.head, trained, hidden, targets)
    return _with_frozen_head(model.logits, hidden, targets)


def _with_frozen_head(logits: Callable[[mx.array], mx.array], hidden: mx.array, targets: mx.array) -> mx.array:
    @mx.custom_function
    def losses_and_slopes(hidden: mx.array) -> tuple[mx.array, mx.array]:
        losses: list[mx.array] = []
        slopes: list[mx.array] = []
        for rows, labels in _chunks(hidden, targets, CHUNK_ROWS):
            if losses:  # one chunk after the other: their logits must not be in memory together
                rows = mx.depends(rows, [losses[-1], slopes[-1]])
            loss, slope = _loss_and_slope(logits(rows), labels)
            _, (slope,) = mx.vjp(logits, [rows], [slope])  # the head is linear: through it, back to the hidden states
            losses.append(loss)
            slopes.append(slope)
        return mx.concatenate(losses), mx.concatenate(slopes)

    @losses_and_slopes.vjp
    def backward(primals: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
        slope = outputs[1]
        return (cotangents[0][:, None] * slope).astype(slope.dtype)  # a row's loss depends on no other row

    return losses_and_slopes(hidden)[0]


def _with_trained_head(
    logits: Callable[[mx.array], mx.array],
    head: nn.Module,
    trained: dict[str, mx.array],
    hidden: mx.array,
    targets: mx.array,
) -> mx.array:
    names = list(trained)

    def chunk_losses(rows: mx.array, labels: mx.array, *weights: mx.array) -> mx.array:
        before = head.trainable_parameters()
        head.update(tree_unflatten(list(zip(names, weights, strict=True))))
        try:
            return _loss_and_slope(logits(rows), labels)[0]
        finally:
            head.update(before)

    @mx.custom_function
    def losses(hidden: mx.array, *weights: mx.array) -> mx.array:
        found: list[mx.array] = []
        for rows, labels in _chunks(hidden, targets, TRAINED_CHUNK_ROWS):
            if found:
                rows = mx.depends(rows, [found[-1]])
            found.append(chunk_losses(rows, labels, *weights))
        return mx.concatenate(found)

    @losses.vjp
    def backward(primals: list[mx.array], cotangent: mx.array, output: mx.array) -> list[mx.array]:
        hidden, *weights = primals
        slopes: list[mx.array] = []
        sums = [mx.zeros_like(weight) for weight in weights]
        parts = mx.split(cotangent, range(TRAINED_CHUNK_ROWS, len(targets), TRAINED_CHUNK_ROWS))
        for (rows, labels), part in zip(_chunks(hidden, targets, TRAINED_CHUNK_ROWS), parts, strict=True):
            if slopes:
                rows = mx.depends(rows, [slopes[-1], *sums])
            inputs = [rows, *weights]
            _, (slope, *more) = mx.vjp(lambda r, *w, labels=labels: chunk_losses(r, labels, *w), inputs, [part])
            sums = [total + new for total, new in zip(sums, more, strict=True)]
            slopes.append(slope)
        return [mx.concatenate(slopes), *sums]

    return losses(hidden, *trained.values())


def _chunks(hidden: mx.array, targets: mx.array, size: int) -> Iterator[tuple[mx.array, mx.array]]:
    return ((hidden[at : at + size], targets[at : at + size]) for at in range(0, len(targets), size))


def _loss_and_slope(logits: mx.array, labels: mx.array) -> tuple[mx.array, mx.array]:
    """Cross-entropy [N] in fp32, and its gradient with respect to the logits [N, V], in their dtype."""
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

"""CTC, a loss for sequences whose alignment is not known, in logarithms.

Source: Graves et al. 2006, "Connectionist temporal classification".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cpu_math
import mlx.core as mx
import numpy as np

NEVER = -1e5  # the logarithm of a probability of zero


@dataclass(frozen=True, eq=False)
class Labels:
    """Sequences of labels with a blank before, between and after.

    Attributes:
        states: [B, S], the label of each state; the blank is the last class.
        skips: bool [B, S], states that may follow the one before the last: a label behind another one.
        last: [B], the last state of each row, a blank.
    """

    states: mx.array
    skips: mx.array
    last: mx.array

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], blank: int, most: int) -> Labels:
        """Labels of rows of at most `most` classes."""
        states = np.full((len(rows), 2 * most + 1), blank)
        skips = np.zeros(states.shape, bool)
        for row, labels in enumerate(rows):
            states[row, 1 : 2 * len(labels) : 2] = labels
            for at in range(1, len(labels)):
                skips[row, 2 * at + 1] = labels[at] != labels[at - 1]
        return cls(mx.array(states), mx.array(skips), mx.array([2 * len(labels) for labels in rows]))


def loss(logits: mx.array, labels: Labels) -> mx.array:
    """-log of the probability of the labels under all alignments, [B, T, C] -> the mean over rows."""
    B, T, _ = logits.shape
    S = labels.states.shape[1]
    chances = logits - cpu_math.logsumexp(logits)[..., None]
    chances = mx.take_along_axis(chances, mx.broadcast_to(labels.states[:, None], (B, T, S)), -1)
    paths = mx.where(mx.arange(S) < 2, chances[:, 0], NEVER)
    for time in range(1, T):
        from_before = mx.concatenate([mx.full((B, 1), NEVER), paths[:, :-1]], axis=1)
        over_blank = mx.concatenate([mx.full((B, 2), NEVER), paths[:, :-2]], axis=1)
        over_blank = mx.where(labels.skips, over_blank, NEVER)
        paths = mx.maximum(_add(paths, from_before, over_blank) + chances[:, time], NEVER)
    ends = [mx.take_along_axis(paths, (labels.last - back)[:, None], 1) for back in (0, 1)]
    return -_add(*ends).mean()


def _add(first: mx.array, *others: mx.array) -> mx.array:
    """The logarithm of the sum of probabilities."""
    top = first
    for other in others:
        top = mx.maximum(top, other)
    top = mx.stop_gradient(top)
    return top + mx.log(sum(cpu_math.exp(each - top) for each in (first, *others)))


def best(logits: np.ndarray) -> list[int]:
    """The labels [n] of the most probable alignment, of logits [T, C]."""
    path = logits.argmax(-1)
    blank = logits.shape[-1] - 1
    return [int(label) for at, label in enumerate(path) if label != blank and (at == 0 or path[at - 1] != label)]

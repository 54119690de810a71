"""KL divergence of next-token distributions, through a head that is read in blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import mlx.core as mx

from phi4_mlx.errors import RequestError

Head = Callable[[], Iterable[mx.array]]
"""The rows of a head from the first, in blocks [rows, D]; called each time that they are needed."""


class Reference:
    """The distributions of the unquantised model.

    Args:
        hidden: inputs of the head, fp32 [N, D].
        head: its rows.
    """

    def __init__(self, hidden: mx.array, head: Head):
        self._hidden, self._head = hidden, head
        self._normaliser = mx.full((len(hidden),), -mx.inf)
        for rows in head():
            block = mx.logsumexp(hidden @ rows.astype(mx.float32).T, axis=-1)
            self._normaliser = mx.logaddexp(self._normaliser, block)
            mx.eval(self._normaliser)

    def divergence(self, hidden: mx.array, head: Head | None = None) -> float:
        """Mean over the tokens of the KL divergence of other distributions from these, in nats.

        Args:
            hidden: inputs of the head, fp32 [N, D].
            head: its rows, in blocks as large as the reference's; None for the same.

        Raises:
            RequestError: the divergence is NaN or infinite.
        """
        normaliser = mx.full((len(hidden),), -mx.inf)
        gap = mx.zeros((len(hidden),))
        for own, other in zip(self._head(), (head or self._head)(), strict=True):
            logits = self._hidden @ own.astype(mx.float32).T
            changed = hidden @ other.astype(mx.float32).T
            gap = gap + (mx.exp(logits - self._normaliser[:, None]) * (logits - changed)).sum(axis=-1)
            normaliser = mx.logaddexp(normaliser, mx.logsumexp(changed, axis=-1))
            mx.eval(gap, normaliser)
        found: float = (gap - self._normaliser + normaliser).mean().item()
        if not math.isfinite(found):
            raise RequestError(
                "a quantised matrix makes logits on the calibration text NaN or infinite; the checkpoint is damaged"
            )
        return max(0.0, found)  # rounding can take it below

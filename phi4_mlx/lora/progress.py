"""Progress of a run: the results of a step, which is an update of the parameters, and the counters of the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

Tick = Callable[[float, float], object]
"""Progress callback: (batches done, batches done at the next call), such as (2.25, 2.5)."""

Watch = Callable[[str, float, float, int], object]
"""Progress callback: (name of the pass, the two of `Tick`, total batches); "step", "validation" or "test"."""


def no_tick(done: float, following: float) -> None:
    """A `Tick` that does nothing."""


def unwatched(name: str, done: float, following: float, total: int) -> None:
    """A `Watch` that does nothing."""


def tick_of(watch: Watch, name: str, total: int, begun: int = 0) -> Tick:
    """The `Tick` of one pass over batches, `begun` of which were done before."""
    return lambda done, following: watch(name, begun + done, begun + following, total)


@dataclass(frozen=True)
class Step:
    """The results of one step.

    Attributes:
        step: number of batches of the run up to here, its own included.
        loss: mean over its targets in nats; in preference tuning, over its pairs.
        learning_rate: the rate of its update.
        tokens: number of its targets, or pairs.
        grad_norm: norm of the gradient, before clipping.
        seconds: wall time.
        peak_bytes: peak of MLX's memory so far.
        valid_loss: loss of the validation after it, in nats; None without one.
        accuracy: share of its pairs whose chosen answer is ahead, from 0 to 1; None without pairs.
        margin: mean margin of its pairs in nats, see `preference.Figures`; None without pairs.
        valid_accuracy: as `accuracy`, of the validation.
    """

    step: int
    loss: float
    learning_rate: float
    tokens: int
    grad_norm: float
    seconds: float
    peak_bytes: int
    valid_loss: float | None = None
    accuracy: float | None = None
    margin: float | None = None
    valid_accuracy: float | None = None


def passes(every: int, before: int, now: int) -> bool:
    """True if a multiple of `every` lies between two counts of batches."""
    return now // every > before // every


@dataclass
class Progress:
    """The counters of a run, all of them JSON values."""

    step: int = 0  # batches learned from
    tokens: int = 0  # targets learned from, or pairs
    best_step: int = 0
    best_loss: float = math.inf
    worse: int = 0  # validations since the best one
    recent: list[float] = field(default_factory=list)  # losses of the last steps

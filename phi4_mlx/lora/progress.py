"""phi4_mlx.lora.progress."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """What one step came to.

    Attributes:
        step: its number, from 1.
        loss: mean over its targets, in nats; over its pairs, in preference tuning.
        learning_rate: that it was made with.
        tokens: its targets, or pairs.
        grad_norm: of the gradient, before it was clipped.
        seconds: wall time.
        peak_bytes: peak of MLX's memory so far.
        valid_loss: of the validation after it, where there was one.
        accuracy: of its pairs, how many have the chosen answer ahead, from 0 to 1; None without pairs.
        margin: by how much, on average; see `preference.Figures`.
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


@dataclass
class Progress:
    """How far a run is; JSON can hold it."""

    step: int = 0
    tokens: int = 0  # targets learned from, or pairs
    best_step: int = 0
    best_loss: float = math.inf
    worse: int = 0  # validations since the best one
    recent: list[float] = field(default_factory=list)  # losses of the last steps

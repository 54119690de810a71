"""The learning rate in words, as the optimizer follows it."""

from __future__ import annotations

import mlx.core as mx
import pytest

from phi4_mlx.lora.settings import Schedule, Settings
from phi4_mlx.lora.training.optimizer import make_optimizer, rate_text

LINEAR = Schedule("linear_schedule", (1e-4, 1e-6, 20), warmup=5)
COSINE = Schedule("cosine_decay", (1e-4, 30))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (Settings(lr_schedule="constant"), "constant at 0.0001"),
        (Settings(lr_schedule="constant", warmup=1), "constant at 0.0001, after 1 update of warm-up"),
        (Settings(warmup=10), "from 0.0001 to 1e-05, a cosine over all 60 updates, after 10 updates of warm-up"),
        (Settings(lr_schedule=COSINE), "cosine_decay(0.0001, 30); 0 from update 30 on"),
        (
            Settings(lr_schedule=Schedule("cosine_decay", (1e-4, 30, 1e-5))),
            "cosine_decay(0.0001, 30, 1e-05); 1e-05 from update 30 on",
        ),
        (
            Settings(lr_schedule=LINEAR),
            "linear_schedule(0.0001, 1e-06, 20), after 5 updates of warm-up; 1e-06 from update 26 on",
        ),
        (Settings(lr_schedule=Schedule("exponential_decay", (1e-4, 0.9))), "exponential_decay(0.0001, 0.9)"),
        (Settings(lr_schedule=Schedule("step_decay", (1e-4, 0.9, 10))), "step_decay(0.0001, 0.9, 10)"),
    ],
)  # fmt: skip
def test_the_plan_says_the_learning_rate(settings: Settings, text: str) -> None:
    assert rate_text(settings, 60) == text


@pytest.mark.parametrize(("schedule", "update", "end"), [(LINEAR, 26, 1e-6), (COSINE, 30, 0.0)])
def test_a_schedule_of_its_own_length_ends_where_the_plan_says(schedule: Schedule, update: int, end: float) -> None:
    optimizer = make_optimizer(Settings(lr_schedule=schedule), 60)
    rate = optimizer._schedulers["learning_rate"]
    assert rate(mx.array(update)).item() == pytest.approx(end, abs=1e-12)
    assert rate(mx.array(update - 1)).item() > end and rate(mx.array(1000)).item() == pytest.approx(end, abs=1e-12)

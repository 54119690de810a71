"""The optimizer of a run, and how its learning rate goes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from phi4_mlx.lora.settings import Schedule, Settings


def make_optimizer(settings: Settings) -> optim.Optimizer:
    """The optimizer, its learning rate rising over the warm-up and then falling along a cosine, or constant."""
    schedule = settings.lr_schedule
    rate = _schedule(schedule) if isinstance(schedule, Schedule) else _rate(settings)
    more = dict(settings.optimizer_config)
    if settings.optimizer == "adafactor":
        more = {"weight_decay": settings.weight_decay, **more}
        return optim.Adafactor(learning_rate=rate, relative_step=False, scale_parameter=False, **more)
    if settings.optimizer == "adam":
        return optim.Adam(learning_rate=rate, **{"bias_correction": True, **more})
    return optim.AdamW(
        learning_rate=rate, **{"bias_correction": True, "weight_decay": settings.weight_decay, **more}
    )


def _rate(settings: Settings) -> Any:
    """A number, or a function of the step."""
    rate: Any = settings.learning_rate
    rest = max(settings.iters - settings.warmup, 1)
    if settings.lr_schedule == "cosine":
        rate = optim.cosine_decay(settings.learning_rate, rest, settings.learning_rate / 10)
    if settings.warmup:
        first = settings.learning_rate / (settings.warmup + 1)
        rise = optim.linear_schedule(first, settings.learning_rate, settings.warmup)
        after = rate if callable(rate) else lambda step: mx.array(settings.learning_rate)
        rate = optim.join_schedules([rise, after], [settings.warmup])
    return rate


def _schedule(schedule: Schedule) -> Any:
    """As mlx-lm builds it, to the step.

    Source: `build_schedule` in mlx_lm/tuner/utils.py.
    """
    after = getattr(optim, schedule.name)(*schedule.arguments)
    if not schedule.warmup:
        return after
    rise = optim.linear_schedule(schedule.warmup_init, schedule.arguments[0], schedule.warmup)
    return optim.join_schedules([rise, after], [schedule.warmup + 1])

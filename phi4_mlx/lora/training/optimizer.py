"""The optimizer of a run, with its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from phi4_mlx.lora.settings import DEFAULT_ITERS, SCHEDULES, Schedule, Settings
from phi4_mlx.terminal.amount import amount

Rate = float | Callable[[mx.array], mx.array]
"""A learning rate: constant, or a function of the step."""


def make_optimizer(settings: Settings, updates: int = DEFAULT_ITERS) -> optim.Optimizer:
    """Makes the optimizer that the settings describe.

    Args:
        settings: optimizer, its options, and the schedule of the learning rate.
        updates: of the whole run, over which a cosine falls.

    Returns:
        The optimizer, which follows the schedule by itself.
    """
    schedule = settings.lr_schedule
    rate = _mlx_lm_schedule(schedule) if isinstance(schedule, Schedule) else _schedule(settings, updates)
    options = dict(settings.optimizer_config)
    if settings.optimizer == "adafactor":
        options = {"weight_decay": settings.weight_decay, **options}
        return optim.Adafactor(learning_rate=rate, relative_step=False, scale_parameter=False, **options)
    if settings.optimizer == "muon":
        return optim.Muon(learning_rate=rate, **{"weight_decay": settings.weight_decay, **options})
    if settings.optimizer == "sgd":
        decay = settings.weight_decay if settings.named("weight_decay") else 0.0
        return optim.SGD(learning_rate=rate, **{"weight_decay": decay, **options})
    options = {"bias_correction": True, **options}
    if settings.optimizer == "adam":
        return optim.Adam(learning_rate=rate, **options)
    return optim.AdamW(learning_rate=rate, **{"weight_decay": settings.weight_decay, **options})


def rate_text(settings: Settings, updates: int) -> str:
    """The learning rate over a run of some updates, in words."""
    schedule = settings.lr_schedule
    warmup = schedule.warmup if isinstance(schedule, Schedule) else settings.warmup
    rise = f", after {amount(warmup, 'update')} of warm-up" if warmup else ""
    if schedule == "constant":
        return f"constant at {settings.learning_rate:g}{rise}"
    if schedule == "cosine":
        low = settings.learning_rate / 10
        return f"from {settings.learning_rate:g} to {low:g}, a cosine over all {amount(updates, 'update')}{rise}"
    assert isinstance(schedule, Schedule)
    text = f"{schedule.name}({', '.join(f'{value:g}' for value in schedule.arguments)}){rise}"
    if schedule.name in ("cosine_decay", "linear_schedule"):
        *_, steps = SCHEDULES[schedule.name]
        end = schedule.arguments[1] if schedule.name == "linear_schedule" else [*schedule.arguments, 0.0][2]
        assert steps is not None
        begin = warmup + 1 if warmup else 0  # see `_mlx_lm_schedule`
        text += f"; {end:g} from update {begin + schedule.arguments[steps]:,.0f} on"
    return text


def _schedule(settings: Settings, updates: int) -> Rate:
    """A cosine or a constant after a linear warm-up."""
    rate: Rate = settings.learning_rate
    if settings.lr_schedule == "cosine":
        steps = max(updates - settings.warmup, 1)
        rate = optim.cosine_decay(settings.learning_rate, steps, settings.learning_rate / 10)
    if not settings.warmup:
        return rate
    first = settings.learning_rate / (settings.warmup + 1)
    rise = optim.linear_schedule(first, settings.learning_rate, settings.warmup)
    after = rate if callable(rate) else lambda step: mx.array(settings.learning_rate)
    rate = optim.join_schedules([rise, after], [settings.warmup])
    return rate


def _mlx_lm_schedule(schedule: Schedule) -> Rate:
    """One of MLX's schedules after mlx-lm's warm-up.

    Source: `build_schedule` in mlx_lm/tuner/utils.py.
    """
    rate: Rate = getattr(optim, schedule.name)(*schedule.arguments)
    if schedule.warmup:
        rise = optim.linear_schedule(schedule.warmup_init, schedule.arguments[0], schedule.warmup)
        rate = optim.join_schedules([rise, rate], [schedule.warmup + 1])
    return rate

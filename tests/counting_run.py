"""A small run for tests of training: a tiny model learns to count up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from phi4_mlx.adapters.layers import adapter_parameters, add_adapter
from phi4_mlx.data.samples import Sample
from phi4_mlx.lora.saving.run_folder import RunFolder
from phi4_mlx.lora.settings import Settings
from phi4_mlx.lora.training.batches import Batches
from phi4_mlx.lora.training.trainer import Trainer
from phi4_mlx.models.text import Model

SETTINGS = Settings(
    iters=12, batch_size=2, max_seq_length=64, learning_rate=1e-2, save_every=4, steps_per_eval=4, warmup=2, seed=3
)


def samples(n: int = 24) -> list[Sample]:
    """Sequences that count up, of different lengths."""
    made = []
    for k in range(n):
        ids = [(7 * k + i) % 500 for i in range(8 + k % 20)]
        made.append(Sample(ids, [False] + [True] * (len(ids) - 1), f"train.jsonl:{k + 1}"))
    return made


def trainer(
    make: Callable[..., Model], folder: Path, dropout: float = 0.1, *,
    warn: Callable[[str], Any] = lambda message: None, **changes: Any,
) -> Trainer:  # fmt: skip
    """A run of `SETTINGS` with some changes."""
    settings = replace(SETTINGS, **changes)
    model = make()
    add_adapter(model, rank=4, scale=2.0, dropout=dropout, seed=settings.seed)
    options = {"batch_size": settings.batch_size, "max_seq_length": settings.max_seq_length}
    batches = Batches(samples(), seed=settings.seed, **options)
    run_folder = RunFolder(folder, len(model.layers), keep_checkpoints=settings.keep_checkpoints, warn=warn)
    return Trainer(model, batches, settings, run_folder, Batches(samples(6), **options))


def finish(run: Trainer) -> tuple[list[float], dict[str, mx.array]]:
    """The losses of all steps that are left, and the adapter at the end."""
    losses = [step.loss for step in run.run()]
    return losses, adapter_parameters(run.model)


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    """True if the tensors are equal to the bit."""
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)

"""All checks, in the order of the report: from single operations to whole models."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from phi4_mlx.checkpoint import load_config
from phi4_mlx.doctor.check import Check
from phi4_mlx.doctor.forward import Subject, model_checks, subject_checks
from phi4_mlx.doctor.learning import learning_checks
from phi4_mlx.doctor.operations import operation_checks

OWN_LENGTH = 17  # tokens of the prompt of a user's model, which a slow CPU runs too


def all_checks(folder: Path | None = None) -> list[Check]:
    """The checks of the embedded packages, and those of a package of the user's.

    Args:
        folder: of the user's package; None for none.
    """
    own: list[Check] = []
    if folder is not None:
        # Rounding to 16 bits in tens of layers would hide a fault; float32 takes little more memory in 4 bits.
        dtype = mx.float32 if load_config(folder).quantization else None
        own = subject_checks(Subject("--model", folder, dtype), OWN_LENGTH)
    return [*operation_checks(), *model_checks(), *learning_checks(), *own]

"""Computation that the host does not wait for."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from phi4_mlx.models.safe import safe


def queue(*arrays: Any) -> None:
    """Starts the computation of arrays, or of trees of them."""
    (mx.eval if safe("queue") else mx.async_eval)(*arrays)

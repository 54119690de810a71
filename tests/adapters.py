"""Adapters that change something, and their folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.adapters.folder import write_folder
from phi4_mlx.adapters.layers import adapter_layers, add_adapter, current_adapter
from phi4_mlx.adapters.linear import DoRALinear


def adapted(model: nn.Module, kind: str = "lora", seed: int = 0, **options: Any) -> Any:
    """The model with an adapter of rank 4 that changes its logits; `options` as of `add_adapter`."""
    add_adapter(model, **{"rank": 4, "scale": 2.0, "kind": kind, "seed": seed} | options)
    train_a_little(model, seed)
    return model


def train_a_little(model: nn.Module, seed: int = 0) -> None:
    """Moves every tensor of the adapter away from its initial value."""
    for n, layer in enumerate(adapter_layers(model).values()):
        key = mx.random.key(seed + n)
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=key)
        if isinstance(layer, DoRALinear):
            layer.m = layer.m * (1 + 0.3 * mx.random.normal(layer.m.shape, key=key))


def save_adapter(model: nn.Module, folder: Path, config: Mapping[str, object]) -> None:
    """Writes the adapter of a model, or without one everything that is not frozen, as training does."""
    write_folder(folder, current_adapter(model, str(folder)), len(model.layers), config)

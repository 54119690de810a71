"""The LoRAs that a checkpoint brings along, written into folders of their own in the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from phi4_mlx.adapters.folder import Adapter, check_finite, write_folder
from phi4_mlx.adapters.quantized import dense, quantized
from phi4_mlx.adapters.shipped import FOLDERS
from phi4_mlx.checkpoint import empty_model, shipped_with, stored_tensors
from phi4_mlx.config.fields import Config
from phi4_mlx.errors import RequestError
from phi4_mlx.files.dtypes import mlx_dtype

from .quantize import Recipe


def plan_loras(
    folder: Path, config: Config, recipe: Recipe | None, dtype: str | None, dequantize: bool
) -> dict[str, Adapter]:
    """The LoRAs of a checkpoint by their folders in the package; their numbers are read when they are written.

    Args:
        folder: the checkpoint.
        config: its config.
        recipe: names their bits; None leaves them as they are.
        dtype: to cast floating-point numbers to, one of `FLOATS`; None keeps each as it is.
        dequantize: whether to dequantise quantised ones.

    Raises:
        CheckpointError: a LoRA is incomplete, does not fit the model, or has never been trained.
        RequestError: a LoRA cannot be quantised.
    """
    tensors = stored_tensors(folder, config)
    found = shipped_with(empty_model(config, tensors.infos), folder, tensors)
    return {FOLDERS[name]: _converted(adapter, recipe, dtype, dequantize) for name, adapter in found.items()}


def _converted(adapter: Adapter, recipe: Recipe | None, dtype: str | None, dequantize: bool) -> Adapter:
    if dequantize:
        adapter = dense(adapter)
    if dtype:
        kind = mlx_dtype(dtype)
        cast = {name: each if each.dtype == mx.uint32 else each.astype(kind) for name, each in adapter.tensors.items()}
        adapter = replace(adapter, tensors=cast)
    if recipe is None or recipe.adapter_bits is None or adapter.scheme is not None:
        return adapter
    try:
        return quantized(adapter, recipe.adapter_bits)
    except RequestError as error:
        raise RequestError(f"{error}: --adapter-bits 16 does") from None


def lora_bytes(loras: Mapping[str, Adapter]) -> int:
    """Bytes of the tensors."""
    return sum(adapter.nbytes for adapter in loras.values())


def write_loras(out: Path, loras: Mapping[str, Adapter], num_layers: int) -> list[Path]:
    """Writes the folders; returns their files.

    Raises:
        CheckpointError: a LoRA contains NaN or infinity.
    """
    for folder, adapter in loras.items():
        check_finite(adapter.tensors, adapter.source)
        write_folder(out / folder, adapter, num_layers)
        mx.clear_cache()
    return [path for folder in loras for path in sorted((out / folder).iterdir())]

"""The LoRAs that a checkpoint brings along, beside its matrices or in folders of their own, for `NamedAdapters`.

Names, shapes and dtypes are checked when the model is loaded; the numbers stay on the disk until an adapter is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.adapters.folder import Adapter, check_finite, checked
from phi4_mlx.adapters.layers import check_fit, read_adapter
from phi4_mlx.adapters.peft import our_name
from phi4_mlx.errors import CheckpointError
from phi4_mlx.files.lazy_arrays import unchanged
from phi4_mlx.files.regular_file import open_regular
from phi4_mlx.files.safetensors import Stored, read_header

FOLDERS = {"vision": "vision-lora", "speech": "speech-lora"}
"""Name of an adapter -> its folder in the checkpoint's."""

SAMPLE_BYTES = 64  # of each lora_B that is read to tell that one has been trained


def shipped_adapters(
    model: nn.Module,
    folder: Path,
    beside: Mapping[str, Mapping[str, Stored]],
    settings: Mapping[str, tuple[int, float] | None],
) -> dict[str, Adapter]:
    """The LoRAs of a checkpoint by name, checked against its model; their numbers are still on the disk.

    Args:
        model: the model.
        folder: of the checkpoint; its own folders are read where a LoRA is not beside the matrices.
        beside: adapter -> name in PEFT's layout -> tensor, of LoRAs in the files of the weights.
        settings: adapter -> (rank, alpha) in config.json; its names are those of the LoRAs that the model can have.

    Raises:
        CheckpointError: a LoRA is missing beside another or against config.json, is incomplete, does not fit the model,
            or has never been trained.
        ConfigError, RequestError: as `read_adapter`.
    """
    found = {}
    for name in settings:
        if name in beside:
            stored: Iterable[Stored] = beside[name].values()
            adapter = _beside(model, folder, name, beside[name], settings[name])
        elif os.path.isdir(folder / FOLDERS[name]):
            adapter = read_adapter(folder / FOLDERS[name], lazy=True)
            path = Path(adapter.source)
            stored = [Stored(path, tensor, info) for tensor, info in read_header(path).items()]
        else:
            continue
        _check_complete(model, adapter)
        check_fit(model, adapter)
        _check_trained(name, adapter.source, stored)
        found[name] = adapter
    for name in settings.keys() - found.keys():
        if found or settings[name] is not None:
            raise CheckpointError(
                f"{folder} has no {name} LoRA, neither beside the matrices nor in a folder {FOLDERS[name]}; the "
                "checkpoint is incomplete, download it again"
            )
    return found


def add_shipped(model: nn.Module, shipped: Mapping[str, Adapter]) -> None:
    """Adds the LoRAs of a checkpoint to its model, to be read at their first use."""
    for name, adapter in shipped.items():
        model.adapters.add(name, partial(_read, adapter), trained=True, nbytes=adapter.nbytes)


def _read(adapter: Adapter) -> Adapter:
    """The same adapter, its numbers read and checked."""
    with unchanged(f"the weights of {adapter.source}"):
        check_finite(adapter.tensors, adapter.source)
    return adapter


def _beside(
    model: nn.Module, folder: Path, name: str, stored: Mapping[str, Stored], settings: tuple[int, float] | None
) -> Adapter:
    """A LoRA whose tensors are beside the matrices of the base."""
    if settings is None:
        raise CheckpointError(
            f"{folder} has tensors of adapter {name!r}, but its config.json has no {name}_lora with their rank and "
            "alpha; get both from one source"
        )
    rank, alpha = settings
    files = {path: mx.load(str(path)) for path in {each.path for each in stored.values()}}
    tensors = {our_name(each.path, tensor): files[each.path][each.name].T for tensor, each in stored.items()}
    adapter = checked(Adapter("lora", alpha / rank, 0.0, tensors, f"{folder} ({name})"), rank)
    return replace(adapter, num_layers=len(model.layers))


def _check_complete(model: nn.Module, adapter: Adapter) -> None:
    """Refuses a LoRA that lacks layers: those of a checkpoint adapt all matrices of all blocks."""
    expected = {f"model.layers.{n}.{key}" for n in range(len(model.layers)) for key in model.lora_keys}
    if missing := sorted(expected - {*adapter.paths}):
        raise CheckpointError(
            f"{adapter.source}: {missing[0]} has no lora_A and lora_B; the checkpoint is incomplete, download it again"
        )


def _check_trained(name: str, source: str, stored: Iterable[Stored]) -> None:
    """Refuses a LoRA whose lora_B is zero, by a sample of each; PEFT leaves it so where a file's names do not match."""
    matrices = [each for each in stored if "lora_b" in each.name.lower()]
    for each in matrices:
        try:
            with open_regular(each.path) as file:
                file.seek(each.info.start)
                if file.read(min(SAMPLE_BYTES, each.info.end - each.info.start)).strip(b"\0\x80"):  # the sign of -0
                    return
        except OSError as error:
            raise CheckpointError(f"{each.path} cannot be read: {error.strerror}") from None
    for each in matrices:  # zeros so far: look at all of it
        if mx.any(mx.load(str(each.path))[each.name] != 0):
            return
    raise CheckpointError(
        f"{source}: lora_B of adapter {name!r} is zero in all {len(matrices)} layers, so it changes nothing; names in "
        "its file did not match when it was saved (PEFT's prefix base_model.model. was missing), get it again"
    )

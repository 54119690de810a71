"""What of a model a run trains: a fresh adapter, one that was made before, or the model's own weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from phi4_mlx.adapters.folder import FULL, Adapter, place
from phi4_mlx.adapters.layers import DEFAULT_KEYS, add_adapter, put_adapter, read_adapter
from phi4_mlx.errors import RequestError
from phi4_mlx.lora.settings import Settings
from phi4_mlx.models.model import LanguageModel


def make_trainable(model: LanguageModel, settings: Settings) -> None:
    """Leaves unfrozen what the settings say, and nothing else.

    Raises:
        RequestError: an option is out of its limits, does not go with the model, or is not what the adapter to begin
            with has.
        ConfigError, CheckpointError: that adapter is missing, damaged, or of another model.
    """
    _check_full(model, settings)
    if settings.resume_adapter_file is not None:
        adapter = read_adapter(Path(settings.resume_adapter_file))
        _check_like(adapter, settings, len(model.layers))
        put_adapter(model, adapter)
        if adapter.kind == FULL:
            _unfreeze(model, settings, adapter)
    elif settings.fine_tune_type == FULL:
        _unfreeze(model, settings, None)
    else:
        shape = settings.lora_parameters
        layers = None if settings.num_layers == -1 else settings.num_layers
        add_adapter(
            model, rank=shape.rank, scale=shape.scale, dropout=shape.dropout, keys=shape.keys or DEFAULT_KEYS,
            num_layers=layers, kind=settings.fine_tune_type, seed=settings.seed,
        )  # fmt: skip


def _check_full(model: LanguageModel, settings: Settings) -> None:
    """Raises RequestError where the settings ask for weights to be trained that cannot be, or must not."""
    if settings.fine_tune_type != FULL:
        return
    if model.config.quantization:
        raise RequestError(
            "a quantised model cannot be trained whole; use --fine-tune-type lora, or an unquantised model"
        )
    if settings.task == "dpo":
        raise RequestError(
            "DPO measures from the base, so --fine-tune-type full cannot serve; take lora or dora, or --task orpo"
        )


def _unfreeze(model: LanguageModel, settings: Settings, adapter: Adapter | None) -> None:
    """Unfreezes the last blocks, or everything, or what the weights to begin with are of."""
    total = len(model.layers)
    if not -1 <= settings.num_layers <= total:
        raise RequestError(f"num_layers {settings.num_layers} is out of range; the model has {total} layers")
    model.freeze()
    if adapter is not None and not settings.named("num_layers"):
        for path in adapter.paths:
            module = model
            for name in path.split("."):
                module = module[int(name)] if isinstance(module, list) else module[name]
            module.unfreeze(recurse=False)
        return
    if settings.num_layers == -1:
        model.unfreeze()
    else:
        for layer in model.layers[-settings.num_layers :]:
            layer.unfreeze()
    trained = dict(tree_flatten(model.trainable_parameters()))
    for name in () if adapter is None else adapter.tensors:
        if name not in trained:
            raise RequestError(
                f"{settings.resume_adapter_file} holds {name}, which --num-layers {settings.num_layers} leaves out "
                "of the new adapter; leave --num-layers out, or give more layers"
            )


def _check_like(adapter: Adapter, settings: Settings, total: int) -> None:
    """Refuses an adapter to begin with that is not what the settings say."""
    file = settings.resume_adapter_file
    if adapter.kind != settings.fine_tune_type:
        raise RequestError(
            f"{file} is of the kind {adapter.kind}, and --fine-tune-type is {settings.fine_tune_type}; "
            f"--fine-tune-type {adapter.kind} goes on with it"
        )
    if adapter.kind == FULL:
        return
    shape, places = settings.lora_parameters, [place(path) for path in adapter.paths]
    its: dict[str, Any] = {
        "rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout,
        "keys": sorted({key for _, key in places}), "num_layers": total - max(0, min(layer for layer, _ in places)),
    }  # fmt: skip
    wanted: dict[str, Any] = {
        "rank": shape.rank, "scale": shape.scale, "dropout": shape.dropout, "keys": sorted(shape.keys or DEFAULT_KEYS),
        "num_layers": total if settings.num_layers == -1 else settings.num_layers,
    }  # fmt: skip
    for name, value in its.items():
        same = math.isclose(value, wanted[name], rel_tol=1e-6) if isinstance(value, float) else value == wanted[name]
        if settings.named(name) and not same:
            raise RequestError(
                f"{file} has {name} {value}, and the settings say {wanted[name]}; leave {name} out, and it goes on as "
                "it is"
            )

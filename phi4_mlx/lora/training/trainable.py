"""The parameters that a run trains: a new adapter, an existing one, or the model's own weights."""

from __future__ import annotations

import math
from pathlib import Path

from mlx.utils import tree_flatten

from phi4_mlx.adapters.folder import FULL, Adapter, place
from phi4_mlx.adapters.layers import add_adapter, put_adapter, read_adapter
from phi4_mlx.errors import RequestError
from phi4_mlx.lora.settings import Settings
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.terminal.amount import amount


def make_trainable(model: LanguageModel, settings: Settings) -> None:
    """Unfreezes the parameters that the settings name, and freezes all others.

    Args:
        model: the model; gets the adapter.
        settings: the options.

    Raises:
        RequestError: an option is out of its limits, does not fit the model, or differs from the initial adapter.
        ConfigError, CheckpointError: the initial adapter is missing, damaged, or of another model.
    """
    _check_full(model, settings)
    if settings.resume_adapter_file is not None:
        adapter = read_adapter(Path(settings.resume_adapter_file))
        _check_like(adapter, settings, model)
        put_adapter(model, adapter)
        if adapter.kind == FULL:
            _unfreeze(model, settings, adapter)
    elif settings.fine_tune_type == FULL:
        _unfreeze(model, settings, None)
    else:
        shape = settings.lora_parameters
        layers = None if settings.num_layers == -1 else settings.num_layers
        add_adapter(
            model, rank=shape.rank, scale=shape.scale, dropout=shape.dropout, keys=shape.keys or None,
            num_layers=layers, kind=settings.fine_tune_type, seed=settings.seed,
        )  # fmt: skip


def _check_full(model: LanguageModel, settings: Settings) -> None:
    """Refuses to train the model's own weights if they are quantised, or needed unchanged as DPO's base."""
    if settings.fine_tune_type != FULL:
        return
    if model.config.quantization:
        raise RequestError(
            "--fine-tune-type full cannot train a quantised model; use --fine-tune-type lora, or an unquantised model"
        )
    if settings.task == "dpo":
        raise RequestError(
            "DPO compares with the base, which --fine-tune-type full changes; use lora or dora, or --task orpo"
        )


def _unfreeze(model: LanguageModel, settings: Settings, adapter: Adapter | None) -> None:
    """Unfreezes the last blocks, or everything, or the layers of the initial weights."""
    total = len(model.layers)
    if not -1 <= settings.num_layers <= total:
        raise RequestError(f"num_layers {settings.num_layers} is out of range; the model has {amount(total, 'layer')}")
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
        for path, module in model.named_modules():
            if model.on_demand(f"{path}."):  # towers, which text does not reach
                module.freeze(recurse=False)
    else:
        for layer in model.layers[-settings.num_layers :]:
            layer.unfreeze()
    trained = dict(tree_flatten(model.trainable_parameters()))
    for name in () if adapter is None else adapter.tensors:
        if name not in trained:
            raise RequestError(
                f"{settings.resume_adapter_file} holds {name}, which --num-layers {settings.num_layers} leaves out "
                "of the new adapter; remove --num-layers, or raise it"
            )


def _check_like(adapter: Adapter, settings: Settings, model: LanguageModel) -> None:
    """Refuses an initial adapter that differs from the settings."""
    file, total = settings.resume_adapter_file, len(model.layers)
    if adapter.kind != settings.fine_tune_type:
        raise RequestError(
            f"{file} is of the kind {adapter.kind}, and --fine-tune-type is {settings.fine_tune_type}; "
            f"use --fine-tune-type {adapter.kind}"
        )
    if adapter.kind == FULL:
        return
    shape, places = settings.lora_parameters, [place(path) for path in adapter.paths]
    first_layer = max(0, min(layer for layer, _ in places))
    num_layers = total if settings.num_layers == -1 else settings.num_layers
    pairs: dict[str, tuple[object, object]] = {
        "rank": (adapter.rank, shape.rank),
        "scale": (adapter.scale, shape.scale),
        "dropout": (adapter.dropout, shape.dropout),
        "keys": (sorted({key for _, key in places}), sorted(shape.keys or model.lora_keys)),
        "num_layers": (total - first_layer, num_layers),
    }
    for name, (value, wanted) in pairs.items():
        if settings.named(name) and not _same(value, wanted):
            raise RequestError(
                f"{file} has {name} {value}, and the settings say {wanted}; leave {name} out to keep the file's value"
            )


def _same(value: object, wanted: object) -> bool:
    if isinstance(value, (int, float)) and isinstance(wanted, (int, float)):
        return math.isclose(value, wanted, rel_tol=1e-6)
    return value == wanted

"""Adapters in the layout of Hugging Face's PEFT: `adapter_model.safetensors` and `adapter_config.json`.

PEFT's matrices are the transposes of ours: `lora_A.weight` [R, in] and `lora_B.weight` [out, R]. Its scale is
`lora_alpha / r`, or `lora_alpha / sqrt(r)` under rsLoRA. DoRA's norms are `lora_magnitude_vector` [out].

Source: `LoraConfig` and `get_peft_model_state_dict` in peft.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import mlx.core as mx

from phi4_mlx.adapters.folder import CONFIG_FILE, Adapter, checked, layers_named, place, read_config, read_tensors
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.json_file import JsonObject

PEFT_FILE = "adapter_model.safetensors"

_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_NAME = re.compile(r"base_model\.model\.(.+)\.(?:lora_(?P<matrix>[AB])\.weight|lora_magnitude_vector(?:\.weight)?)")

# Fields that do not change the meaning of the tensors, or are read below. Every other field must be empty, so that an
# unknown one is refused rather than ignored.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision", "runtime_config",
    "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
_ALLOWED: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    # "pissa", "olora" and others change the base model; their tensors do not fit the original base.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def scale_of(alpha: float, rank: int, use_rslora: bool = False) -> float:
    """The factor of the product a b from PEFT's settings.

    Args:
        alpha: PEFT's `lora_alpha`.
        rank: R.
        use_rslora: whether the adapter is rank-stabilised LoRA, which differs in this factor only.

    Source: rsLoRA (arXiv 2312.03732), section 4.
    """
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def is_peft(folder: Path) -> bool:
    """True if a folder has an adapter in PEFT's layout, as safetensors or as pickle."""
    return any(folder.glob("adapter_model.*"))


def read_peft(folder: Path, file: str = PEFT_FILE) -> Adapter:
    """Reads an adapter folder in PEFT's layout.

    Args:
        folder: contains adapter_config.json and the tensors.
        file: the name of the tensors' file.

    Raises:
        ConfigError: adapter_config.json is not a JSON object.
        CheckpointError: a file is missing or damaged, or a tensor is missing, left over or does not fit the others.
        RequestError: the adapter is of a kind that is not supported, or is stored as pickle.
    """
    config, path = read_config(folder), folder / file
    if path.suffix != ".safetensors" or not path.is_file():
        raise RequestError(
            f"{folder} holds no {Path(file).stem}.safetensors; other formats are pickle, which is never read: save it "
            "again with safe_serialization=True"
        )
    _check_config(folder, config)
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout")
    base = config.get("base_model_name_or_path")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise CheckpointError(f"{folder / CONFIG_FILE} has r {rank!r} and lora_alpha {alpha!r}; they must be numbers")
    adapter = Adapter(
        kind="dora" if config.get("use_dora") else "lora",
        scale=scale_of(alpha, rank, config.get("use_rslora") is True),
        dropout=dropout if isinstance(dropout, float) else 0.0,
        tensors={_our_name(path, name): array.T for name, array in read_tensors(path).items()},
        source=str(path),
        only_layers=layers_named(folder, config),
        base_model=base if isinstance(base, str) else None,
    )
    return checked(adapter, rank)


def peft_layout(adapter: Adapter) -> tuple[dict[str, mx.array], JsonObject]:
    """Converts an adapter to PEFT's layout.

    Returns:
        (tensor name -> array, the content of adapter_config.json)
    """
    tensors = {}
    for name, array in adapter.tensors.items():
        path, _, part = name.rpartition(".")
        tensors[f"base_model.model.{path}.{_PARTS[part]}"] = array.T

    places = {place(path) for path in adapter.paths}
    layers, keys = sorted({layer for layer, _ in places}), sorted({key for _, key in places})
    regular = layers[0] >= 0 and places == {(layer, key) for layer in layers for key in keys}
    all_layers = adapter.only_layers is None and layers == list(range(len(layers)))
    alpha = adapter.scale * adapter.rank
    return tensors, {
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": layers if regular and not all_layers else None,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": adapter.dropout,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": [key.rpartition(".")[2] for key in keys] if regular else adapter.paths,
        "task_type": "CAUSAL_LM",
        "use_dora": adapter.kind == "dora",
        "use_rslora": False,  # lora_alpha above is for lora_alpha / r
    }


def _check_config(folder: Path, config: JsonObject) -> None:
    if config.get("peft_type") != "LORA":
        raise RequestError(f"{folder} has a PEFT adapter of type {config.get('peft_type')!r}; only 'LORA' is supported")
    for name, value in config.items():
        if name in _IGNORED:
            continue
        empty = value in (None, False) or (isinstance(value, (dict, list, str)) and not value)
        if not (value in _ALLOWED[name] if name in _ALLOWED else empty):
            raise RequestError(f"{folder / CONFIG_FILE}: {name} = {value!r:.80} asks for maths that is not supported")


def _our_name(path: Path, name: str) -> str:
    found = _NAME.fullmatch(name)
    if not found:
        raise CheckpointError(f"{path}: {name} is left over; a layer has only {', '.join(_PARTS.values())}")
    matrix = found["matrix"]
    return f"{found[1]}.lora_{matrix.lower()}" if matrix else f"{found[1]}.m"

"""Adapters in the layout of Hugging Face's PEFT: `adapter_model.safetensors` and `adapter_config.json`.

PEFT's matrices are the transposes of ours: `lora_A.weight` [R, in] and `lora_B.weight` [out, R]. Its scale is
`lora_alpha / r`, or `lora_alpha / sqrt(r)` under rsLoRA. DoRA's norms are `lora_magnitude_vector` [out].

Under `rank_pattern` and `alpha_pattern` layers have ranks and scales of their own. Ours have one rank and one scale:
the matrices are padded with zeros, and the rest of a layer's scale goes into its `lora_b`, which changes no output.

Source: `LoraConfig`, `get_peft_model_state_dict`, `get_pattern_key` and `check_target_module_exists` in peft.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from phi4_mlx.adapters.folder import (
    CONFIG_FILE,
    Adapter,
    checked,
    is_number,
    layers_named,
    place,
    read_config,
    read_tensors,
)
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.json_file import JsonObject

PEFT_FILE = "adapter_model.safetensors"

_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_NAME = re.compile(
    r"(?:base_model\.model\.)?(.+)\.(?:lora_(?P<matrix>[AB])\.weight|lora_magnitude_vector(?:\.weight)?)"
)

# Fields that do not change the meaning of the tensors, or are read below. Every other field must be empty, so that an
# unknown one is refused rather than ignored.
_IGNORED = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_ALLOWED: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "use_dora": (True, False, None),
    "use_rslora": (True, False, None),
    # "pissa", "olora" and others change the base model; their tensors do not fit the original base.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}

_MAX_RANK = 2**24  # far above the width of a layer
_MAX_PATTERNS = 10_000  # many times the layers of a model
_MAX_PATTERN_LENGTH = 1000
_MAX_REPEATS = 4  # a pattern that repeats more often, or repeats a group, could take hours to match


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


def read_peft(folder: Path, file: str = PEFT_FILE, lazy: bool = False) -> Adapter:
    """Reads an adapter folder in PEFT's layout.

    Names may lack PEFT's prefix `base_model.model.`, as those of Phi-4-multimodal's adapters do.

    Args:
        folder: contains adapter_config.json and the tensors.
        file: the name of the tensors' file.
        lazy: leaves the numbers on the disk; `check_finite` reads them.

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
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    dropout: Any = config.get("lora_dropout") or 0.0
    base = config.get("base_model_name_or_path")
    if not _is_rank(rank) or not is_number(alpha) or not is_number(dropout):
        raise CheckpointError(
            f"{folder / CONFIG_FILE} has r {rank!r:.40} and lora_alpha {alpha!r:.40} and lora_dropout {dropout!r:.40}; "
            "they must be numbers"
        )
    ranks = _Pattern(folder, config, "rank_pattern", _is_rank)
    alphas = _Pattern(folder, config, "alpha_pattern", is_number)
    adapter = Adapter(
        kind="dora" if config.get("use_dora") else "lora",
        scale=scale_of(alpha, rank, bool(config.get("use_rslora"))),
        dropout=float(dropout),
        tensors=_our_tensors(path, read_tensors(path, lazy)),
        source=str(path),
        only_layers=layers_named(folder, config),
        base_model=base if isinstance(base, str) else None,
    )
    _check_targets(adapter, config)
    own_ranks = {path: ranks.value(path, rank) for path in adapter.paths}
    scales = {
        path: scale_of(alphas.value(path, alpha), own, bool(config.get("use_rslora")))
        for path, own in own_ranks.items()
    }
    checked(adapter, own_ranks)
    return _with_one_rank_and_scale(adapter, scales)


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


def _check_targets(adapter: Adapter, config: JsonObject) -> None:
    """Checks that PEFT would use every tensor: those of layers that its config does not target, it would drop."""

    def names(given: object, path: str) -> bool:
        return isinstance(given, list) and any(path == each or path.endswith(f".{each}") for each in given)

    targets, only = config.get("target_modules"), adapter.only_layers
    for path in adapter.paths:
        layer, _ = place(path)
        targeted = not isinstance(targets, list) or names(targets, path)  # a text is a pattern of PEFT's, or all-linear
        chosen = only is None or isinstance(targets, str) or layer in only
        if not targeted or not chosen or names(config.get("exclude_modules"), path):
            raise CheckpointError(
                f"{adapter.source}: {path:.200} is left over: target_modules, exclude_modules and layers_to_transform "
                f"of {CONFIG_FILE} do not choose it; get both files from one source"
            )


class _Pattern:
    """A `rank_pattern` or an `alpha_pattern`: the values of some layers, by a regular expression of their path."""

    def __init__(self, folder: Path, config: JsonObject, name: str, valid: Callable[[object], bool]):
        found = config.get(name) or {}
        if not isinstance(found, dict) or len(found) > _MAX_PATTERNS or not all(map(valid, found.values())):
            raise CheckpointError(
                f"{folder / CONFIG_FILE} has {name} {found!r:.80}; it must map at most {_MAX_PATTERNS:,} names to "
                "numbers"
            )
        self._values: list[tuple[re.Pattern[str], Any]] = []
        for key, value in found.items():
            try:
                repeats = len(re.findall(r"[*+{]", key))
                if repeats > _MAX_REPEATS or len(key) > _MAX_PATTERN_LENGTH or re.search(r"\)[*+{]", key):
                    raise re.error("it repeats too much")
                self._values.append((re.compile(rf"(.*\.)?({key})$"), value))
            except (re.error, OverflowError, RecursionError) as error:
                raise RequestError(f"{folder / CONFIG_FILE}: {name} has the key {key!r:.80}: {error}") from None

    def value(self, path: str, default: Any) -> Any:
        """The value of the layer at `path`: of the first key that matches."""
        return next((value for key, value in self._values if key.match(path)), default)


def _with_one_rank_and_scale(adapter: Adapter, scales: Mapping[str, float]) -> Adapter:
    """The same adapter with the largest of its ranks and scales in every layer."""
    largest = max(scales.values(), key=abs)
    most = max(adapter.of(path)[0].shape[1] for path in adapter.paths)
    tensors = dict(adapter.tensors)
    for path, scale in scales.items():
        a, b, *_ = adapter.of(path)
        missing = most - a.shape[1]
        if missing:
            a, b = mx.pad(a, [(0, 0), (0, missing)]), mx.pad(b, [(0, missing), (0, 0)])
        if scale != largest:
            b = b.astype(mx.float32) * (scale / largest)
        tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
    return replace(adapter, tensors=tensors, scale=largest)


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MAX_RANK


def _our_tensors(path: Path, given: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The tensors of a file under our names, transposed."""
    tensors: dict[str, mx.array] = {}
    for name, array in given.items():
        own = our_name(path, name)
        if own in tensors:
            raise CheckpointError(f"{path} has {name} twice, with PEFT's prefix and without; keep one")
        tensors[own] = array.T
    return tensors


def our_name(path: Path, name: str) -> str:
    """The name of a tensor of PEFT's layout in ours; CheckpointError names the file of one that is not PEFT's."""
    found = _NAME.fullmatch(name)
    if not found:
        raise CheckpointError(f"{path}: {name} is left over; a layer has only {', '.join(_PARTS.values())}")
    matrix = found["matrix"]
    return f"{found[1]}.lora_{matrix.lower()}" if matrix else f"{found[1]}.m"

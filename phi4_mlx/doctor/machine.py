"""The machine, its versions, and the models of the family that fit its memory; nothing that names its user."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.checkpoint import KINDS, load_model
from phi4_mlx.doctor.devices import devices
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.memory import plan_context
from phi4_mlx.models.machine import machine_bytes, memory_limit
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.safe import switched_off
from phi4_mlx.terminal.version import __version__

WIRED_LIMIT = "iogpu.wired_limit_mb"  # of macOS 15 and later; 0 is the system's own

_PHI_4 = {
    "model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
    "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352,
}  # fmt: skip
_MINI = {
    "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "max_position_embeddings": 131072,
    "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
}  # fmt: skip
FAMILY: dict[str, dict[str, Any]] = {
    "Phi-4-mini-instruct": _MINI,
    "Phi-4-mini-flash-reasoning": {
        "model_type": "phi4flash", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
        "num_attention_heads": 40, "num_key_value_heads": 20, "vocab_size": 200064, "max_position_embeddings": 262144,
        "sliding_window": 512, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mb_per_layer": 2,
        "layer_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "Phi-4-multimodal-instruct without its adapters": _MINI | {"model_type": "phi4_multimodal"},
    "Phi-3.5-mini-instruct": _MINI | {
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "partial_rotary_factor": 1.0,
        "tie_word_embeddings": False,
    },
    "Phi-4": _PHI_4 | {"max_position_embeddings": 16384},
    "Phi-4-reasoning": _PHI_4 | {"max_position_embeddings": 32768},
}  # fmt: skip
"""The config.json of each model of the family, without what takes no memory; all have heads of 64, 96 or 128.

Source: their config.json on Hugging Face.
"""


class Machine(TypedDict):
    """Versions and hardware.

    Attributes:
        versions: of Python, the packages and the system; None for a package that is not installed.
        chip: the name of the chip, as MLX has it.
        devices: those that MLX computes on, with the default one last.
        memory_bytes: of the machine.
        limit_bytes: that MLX recommends to use, or else all of the memory.
        wired_limit_mb: the system's limit of wired memory as it is set; 0 if it is not, None where there is none.
        switched_off: the fast paths that PHI4_MLX_SAFE names.
    """

    versions: dict[str, str | None]
    chip: str
    devices: list[str]
    memory_bytes: int
    limit_bytes: int
    wired_limit_mb: int | None
    switched_off: list[str]


class Fit(TypedDict):
    """A model in 4 bits, and the longest context that fits; 0 if the weights alone do not.

    Attributes:
        model: its name.
        weights_bytes: of its weights.
        context: the most tokens of its context.
        longest: the most tokens that fit, by the bits of keys and values; "16" for bfloat16.
    """

    model: str
    weights_bytes: int
    context: int
    longest: dict[str, int]


def about() -> Machine:
    """The facts of this machine."""
    system = platform.mac_ver()[0]
    versions: dict[str, str | None] = {
        "phi4_mlx": __version__,
        "mlx": mx.__version__,
        "mlx-lm": _version("mlx-lm"),
        "python": platform.python_version(),
        "system": f"macOS {system}" if system else f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
    }
    info = mx.device_info()
    return {
        "versions": versions,
        "chip": str(info.get("device_name", "unknown")),
        "devices": [device.name for device in devices()],
        "memory_bytes": machine_bytes(),
        "limit_bytes": memory_limit(),
        "wired_limit_mb": _wired_limit_mb(),
        "switched_off": switched_off(),
    }


def fits(folder: Path | None = None) -> list[Fit]:
    """The models of the family in 4 bits, and a user's own package as it is."""
    found = [_fit(name, _quantized(raw)) for name, raw in FAMILY.items()]
    return [*found, _fit("--model", load_model(folder))] if folder is not None else found


def _quantized(raw: dict[str, Any]) -> LanguageModel:
    """The model in bfloat16 and 4 bits, with weights that are never computed."""
    kind = KINDS[raw["model_type"]]
    model = kind.model(kind.config(raw))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 64, 4, class_predicate=model.quantizable)
    return model


def _fit(name: str, model: LanguageModel) -> Fit:
    longest = {}
    for bits in (None, 8, 4):
        with contextlib.suppress(RequestError):  # a model whose cache cannot be quantised
            longest[str(bits or 8 * model.dtype.size)] = plan_context(model, bits).most_tokens
    context = model.config.max_position_embeddings
    return {"model": name, "weights_bytes": model.weights_bytes, "context": context, "longest": longest}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _wired_limit_mb() -> int | None:
    if platform.system() != "Darwin":
        return None
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", WIRED_LIMIT], capture_output=True, text=True, timeout=10)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None

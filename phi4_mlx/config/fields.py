"""Fields of a config.json that every kind of model reads, and the checks of their values."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

from phi4_mlx.errors import ConfigError

MAX_COUNT = 2**24  # far above any count of the family, and small enough for MLX's shapes

_QUANTIZATION_KEYS = {"group_size", "bits", "mode"}

MODEL_FOLDER = "a model folder holds config.json, weights and tokenizer files"  # advice where config.json is missing

QUANTIZATION_MODES = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
"""Mode -> (bits, group sizes) that mlx supports, the default first. Source: `mlx.core.quantize`."""

# Maths that no decoder of the family implements: each field, and the values that leave it unused.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False, None),
    "lm_head_bias": (False, None),
    "qk_norm": (False, None),
    "use_qk_norm": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "logits_scaling": (1, None),
    "num_local_experts": (0, 1, None),
    "quantize_activations": (False, None),
}


class Config(Protocol):
    """The fields that every kind of config has."""

    @property
    def model_type(self) -> str:
        """The kind of model, a key of `phi4_mlx.checkpoint.KINDS`."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, [V]."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, [D]."""

    @property
    def max_position_embeddings(self) -> int:
        """The context: the most tokens of a prompt and its answer."""

    @property
    def context_note(self) -> str:
        """Text that follows the context's length in messages, if config.json may claim another one; else ""."""

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""

    @property
    def tie_word_embeddings(self) -> bool:
        """True if the head is the embedding."""

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The quantisation of the weights, as config.json has it; None for none."""

    def to_dict(self) -> dict[str, Any]:
        """The config as a config.json."""


def quantization(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantisation in a config.json, checked; None for none.

    Raises:
        ConfigError: a mode, a width or a method is not supported.
    """
    found = raw.get("quantization") or raw.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if method is not None or "group_size" not in found or "bits" not in found:
        raise ConfigError(
            f"config.json: quantization {brief(method or found)} is not supported; convert the unquantised checkpoint"
        )
    layers = {name: value for name, value in found.items() if name not in _QUANTIZATION_KEYS}
    _check_quantization("quantization", found)
    for name, value in layers.items():
        if isinstance(value, Mapping) and not any(value[key] for key in value.keys() - _QUANTIZATION_KEYS):
            _check_quantization(f"quantization of {name}", value)
        elif not isinstance(value, bool):
            raise ConfigError(
                f"config.json: quantization of {name:.200} must be true, false or an object of group_size, bits and "
                f"mode, not {brief(value)}"
            )
    return dict(found)


def _check_quantization(where: str, settings: Mapping[str, Any]) -> None:
    """Mode, bits and group size of all layers or of one. Where one is null or absent, the mode's default holds."""
    mode = settings.get("mode", "affine")
    if not isinstance(mode, str) or mode not in QUANTIZATION_MODES:
        raise ConfigError(
            f"config.json: {where:.200} has mode {brief(mode)}; known are {', '.join(QUANTIZATION_MODES)}"
        )
    for key in ("bits", "group_size"):
        count(settings, key, 1)


def check_unused(raw: Mapping[str, Any], own: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses a field that asks for maths which no decoder implements; `own` adds those of one kind."""
    for name, unused in {**_UNUSED, **own}.items():
        if name in raw and raw[name] not in unused:
            raise ConfigError(f"config.json: {name} = {brief(raw[name])} is not supported; only {unused[0]!r} is")


def count(raw: Mapping[str, Any], name: str, default: int | None = None, most: int = MAX_COUNT) -> int:
    """A field that must be a whole number from 1 to `most`; ConfigError names it. Null stands for the default."""
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"config.json: {name} must be a whole number from 1 to {most:,}, not {brief(value)}")
    return value


def number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A field that must be a number above 0; ConfigError names it. Null stands for the default."""
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"config.json: {name} must be a number above 0, not {brief(value)}")
    return float(value)


def brief(value: Any) -> str:
    """A value as errors show it; Python refuses to print a number of thousands of digits."""
    if isinstance(value, int) and abs(value) > 10**40:
        return "a number of more than 40 digits"
    try:
        return f"{value!r:.100}"
    except ValueError:
        return f"a {type(value).__name__} with a number of thousands of digits"


def flag(raw: Mapping[str, Any], name: str) -> bool:
    """A field that must be true or false; ConfigError names it. Null and absence are false."""
    value = raw.get(name)
    if value not in (True, False, None) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        raise ConfigError(f"config.json: {name} must be true or false, not {brief(value)}")
    return bool(value)

"""config.json -> one frozen, complete config a model kind, before any weight exists.

A config that needs maths which its model does not implement is refused here, with the name of the field. Both layouts
are read: `rope_scaling` beside `rope_theta` (transformers 4), and `rope_parameters` (transformers 5).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from phi4_mlx.errors import ConfigError
from phi4_mlx.files.json_file import read_json
from phi4_mlx.terminal.amount import amount

# Maths that the decoder does not implement: each field, and the values that leave it unused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
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
    "rope_traditional": (False, None),
    "quantize_activations": (False, None),
}

_ROPE_KEYS = {
    "type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "short_factor", "long_factor", "factor", "attention_factor",
}  # fmt: skip

_MAX_COUNT = 2**24  # far above any count of the family, and small enough for MLX's shapes

_QUANTIZATION_KEYS = {"group_size", "bits", "mode"}

MODEL_FOLDER = "a model folder holds config.json, weights and tokenizer files"  # advice where config.json is missing

QUANTIZATION_MODES = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
"""Mode -> (bits, group sizes) that mlx supports, the default first. Source: `mlx.core.quantize`."""


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


@dataclass(frozen=True)
class RopeScaling:
    """The two LongRoPE tables: a divisor of the frequency for each rotating pair.

    Source: LongRoPE (arXiv 2402.13753) and `_compute_longrope_parameters` in transformers.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float  # scale of cos and sin, under both tables


@dataclass(frozen=True)
class ModelConfig:
    """The shapes of a phi3 decoder, under Hugging Face's field names. The defaults are those of `Phi3Config`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    quantization: Mapping[str, Any] | None = field(default=None, hash=False)
    model_type: str = "phi3"

    @property
    def rotary_dims(self) -> int:
        """The number of head dimensions that rotate: the first ones."""
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads `folder/config.json`.

        Raises:
            ConfigError: as for `from_dict`; or the file is missing or not JSON.
        """
        return cls.from_dict(read_json(folder / "config.json", if_missing=MODEL_FOLDER))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Builds the config from a parsed config.json in either layout.

        Raises:
            ConfigError: a field is missing, out of range, or needs maths that is not implemented.
        """
        return _parse(raw)

    def to_dict(self) -> dict[str, Any]:
        """The config as a config.json in transformers 4 layout, which mlx-lm and the Swift loader read too."""
        raw: dict[str, Any] = {
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": self.model_type,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "partial_rotary_factor": self.partial_rotary_factor,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.vocab_size,
        }
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raw["head_dim"] = self.head_dim
        if self.rope_scaling:
            raw["rope_scaling"] = {
                "long_factor": list(self.rope_scaling.long_factor),
                "short_factor": list(self.rope_scaling.short_factor),
                "type": "longrope",
            }
            if self.rope_scaling.attention_factor != _attention_factor(raw, {}):
                raw["rope_scaling"]["attention_factor"] = self.rope_scaling.attention_factor
        if self.quantization:
            raw["quantization"] = raw["quantization_config"] = dict(self.quantization)
        return raw


def _parse(raw: Mapping[str, Any]) -> ModelConfig:
    if raw.get("model_type") != "phi3":
        raise ConfigError(
            f"config.json: model_type {raw.get('model_type')!r} is another architecture; ModelConfig reads only 'phi3' "
            "(Phi-4-mini, Phi-3.5-mini, Phi-4)"
        )
    for name, neutral in _NEUTRAL.items():
        if raw.get(name) not in neutral:
            raise ConfigError(
                f"config.json: {name} = {_brief(raw[name])} is not supported; only {neutral[0]!r} is"
            )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"config.json: hidden_act = {raw['hidden_act']!r} is not supported; only 'silu' is")

    hidden_size = _count(raw, "hidden_size")
    heads = _count(raw, "num_attention_heads")
    kv_heads = _count(raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if raw.get("head_dim") is None and hidden_size % heads:
        raise ConfigError(f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
    head_dim = _count(raw, "head_dim", hidden_size // heads)
    max_positions = _count(raw, "max_position_embeddings")
    _check_window(raw, max_positions)

    rope = _rope_dict(raw)
    partial = _number(rope, "partial_rotary_factor", 1.0)
    if partial > 1 or int(head_dim * partial) % 2 or int(head_dim * partial) == 0:
        raise ConfigError(
            f"config.json: partial_rotary_factor {partial} of head_dim {head_dim} must give an even number of "
            f"dimensions, from 2 to {head_dim}"
        )
    return ModelConfig(
        hidden_size=hidden_size,
        intermediate_size=_count(raw, "intermediate_size"),
        num_hidden_layers=_count(raw, "num_hidden_layers", most=1000),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=_count(raw, "vocab_size"),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        original_max_position_embeddings=_count(rope, "original_max_position_embeddings"),
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-5),
        rope_theta=_number(rope, "rope_theta", 10000.0),
        partial_rotary_factor=partial,
        rope_scaling=_rope_scaling(raw, rope, int(head_dim * partial) // 2),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
        quantization=_quantization(raw),
    )


def _check_window(raw: Mapping[str, Any], max_positions: int) -> None:
    """Refuses a window narrower than the context; a wider one never binds."""
    if raw.get("sliding_window") is None:
        return
    window = _number(raw, "sliding_window")
    if window < max_positions:
        raise ConfigError(
            f"config.json: sliding_window {window:.0f} would bind below max_position_embeddings {max_positions}; "
            "windowed attention is not supported"
        )


def _rope_dict(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Both layouts as one dict. The inner dict wins, except for the boundary, as in the reference."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"config.json: rope_scaling must be an object, not {given!r}")
    _check_rope_type(given)
    unknown = sorted(key for key in given if key not in _ROPE_KEYS and given[key] is not None)
    if unknown:
        raise ConfigError(
            f"config.json: {unknown[0]!r} in rope_scaling is unknown; known keys are {sorted(_ROPE_KEYS)}"
        )
    rope = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if raw.get(key) is not None}
    rope |= {key: value for key, value in given.items() if value is not None}
    boundary = raw.get("original_max_position_embeddings")
    rope["original_max_position_embeddings"] = (
        boundary if boundary is not None else rope.get("original_max_position_embeddings", 4096)
    )
    return rope


def _rope_scaling(raw: Mapping[str, Any], rope: Mapping[str, Any], pairs: int) -> RopeScaling | None:
    if _rope_type(rope) == "default":
        return None
    factors = {}
    for name in ("short_factor", "long_factor"):
        values = rope.get(name)
        if not isinstance(values, list) or len(values) != pairs:
            found = amount(len(values), "number") if isinstance(values, list) else repr(values)
            raise ConfigError(
                f"config.json: {name} must be a list of {amount(pairs, 'number')}, one a rotating pair, not {found}"
            )
        factors[name] = tuple(_number({name: value}, name) for value in values)
    return RopeScaling(**factors, attention_factor=_attention_factor(raw, rope))


def _rope_type(rope: Mapping[str, Any]) -> Any:
    """The RoPE type, under either layout's key."""
    return rope.get("rope_type") or rope.get("type") or "default"


def _check_rope_type(rope: Mapping[str, Any]) -> None:
    kind = _rope_type(rope)
    # Early Phi-3 configs call LongRoPE "su" or "yarn".
    if kind not in ("default", "longrope", "su", "yarn"):
        raise ConfigError(f"config.json: rope type {kind!r} is not supported; only 'default' and 'longrope' are")


def _attention_factor(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    """sqrt(1 + ln(factor) / ln(boundary)), which keeps the softmax sharp over the longer context."""
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    boundary = rope.get("original_max_position_embeddings") or raw["original_max_position_embeddings"]
    factor = _number(rope, "factor", raw["max_position_embeddings"] / boundary)
    if factor > 1 and boundary == 1:
        raise ConfigError(
            "config.json: original_max_position_embeddings must be over 1: LongRoPE's scale divides by its logarithm"
        )
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(boundary))


def _quantization(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = raw.get("quantization") or raw.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if method is not None or "group_size" not in found or "bits" not in found:
        raise ConfigError(
            f"config.json: quantization {_brief(method or found)} is not supported; convert the unquantised checkpoint"
        )
    layers = {name: value for name, value in found.items() if name not in _QUANTIZATION_KEYS}
    _check_quantization("quantization", found)
    for name, value in layers.items():
        if isinstance(value, Mapping) and not any(value[key] for key in value.keys() - _QUANTIZATION_KEYS):
            _check_quantization(f"quantization of {name}", value)
        elif not isinstance(value, bool):
            raise ConfigError(
                f"config.json: quantization of {name:.200} must be true, false or an object of group_size, bits and "
                f"mode, not {_brief(value)}"
            )
    return dict(found)


def _check_quantization(where: str, settings: Mapping[str, Any]) -> None:
    """Mode, bits and group size of all layers or of one. Where one is null or absent, the mode's default holds."""
    mode = settings.get("mode", "affine")
    if not isinstance(mode, str) or mode not in QUANTIZATION_MODES:
        raise ConfigError(
            f"config.json: {where:.200} has mode {_brief(mode)}; known are {', '.join(QUANTIZATION_MODES)}"
        )
    for key in ("bits", "group_size"):
        _count(settings, key, 1)


def _count(raw: Mapping[str, Any], name: str, default: int | None = None, most: int = _MAX_COUNT) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"config.json: {name} must be a whole number from 1 to {most:,}, not {_brief(value)}")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"config.json: {name} must be a number above 0, not {_brief(value)}")
    return float(value)


def _brief(value: Any) -> str:
    """A value as errors show it; Python refuses to print a number of thousands of digits."""
    if isinstance(value, int) and abs(value) > 10**40:
        return "a number of more than 40 digits"
    return f"{value!r:.100}"


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value not in (True, False, None) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        raise ConfigError(f"config.json: {name} must be true or false, not {_brief(value)}")
    return bool(value)

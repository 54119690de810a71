"""config.json -> a frozen, complete `ModelConfig`, before any weight exists.

One decoder serves the whole family, so a config that asks for anything else is refused here, by the name of the field.
Both layouts are read: `rope_scaling` beside `rope_theta` (transformers 4), and `rope_parameters` (transformers 5).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi4_mlx.errors import ConfigError
from phi4_mlx.files.json_file import read_json

# Maths that the decoder does not do: each field, and the values under which it changes nothing.
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
}

_ROPE_KEYS = {
    "type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "short_factor", "long_factor", "factor", "attention_factor",
}  # fmt: skip

_LARGEST = 2**24  # of a count: far above any of the family's, and small enough for MLX's shapes

QUANTIZATION_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


@dataclass(frozen=True)
class RopeScaling:
    """The two LongRoPE tables; one divisor of the frequency for each rotating pair.

    Source: LongRoPE (arXiv 2402.13753) and `_compute_longrope_parameters` in transformers.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float  # scale of cos and sin, the same under both tables


@dataclass(frozen=True)
class ModelConfig:
    """What the decoder needs to know, under Hugging Face's own names. The defaults are those of `Phi3Config`."""

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
        """How many of the head's dimensions rotate: the first ones."""
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads `folder/config.json`.

        Raises:
            ConfigError: as `from_dict`, and for a file that is missing or not JSON.
        """
        advice = "a model folder holds config.json, weights and tokenizer files"
        return cls.from_dict(read_json(folder / "config.json", if_missing=advice))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Makes the config from a parsed config.json in either layout.

        Raises:
            ConfigError: a field is missing, is not a sensible number, or asks for maths that is not done here.
        """
        return _parse(raw)

    def to_dict(self) -> dict[str, Any]:
        """The same config as a config.json in transformers 4 layout, which mlx-lm and the Swift loader read too."""
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
            f"config.json: model_type {raw.get('model_type')!r} is another architecture; "
            "this package runs 'phi3' (Phi-4-mini, Phi-3.5-mini, Phi-4)"
        )
    for name, neutral in _NEUTRAL.items():
        if raw.get(name) not in neutral:
            raise ConfigError(
                f"config.json: {name} = {_brief(raw[name])} asks for maths not done here; only {neutral[0]!r} is"
            )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"config.json: hidden_act = {raw['hidden_act']!r} is not done here; only 'silu' is")

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
    """A window as wide as the context changes nothing; a narrower one binds."""
    if raw.get("sliding_window") is None:
        return
    window = _number(raw, "sliding_window")
    if window < max_positions:
        raise ConfigError(
            f"config.json: sliding_window {window:.0f} would bind below max_position_embeddings {max_positions}; "
            "windowed attention is not done here"
        )


def _rope_dict(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Both layouts as one dict. What stands inside the dict wins, but for the boundary, as in the reference."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"config.json: rope_scaling must be an object, not {given!r}")
    _check_rope_type(given)
    unknown = sorted(key for key in given if key not in _ROPE_KEYS and given[key] is not None)
    if unknown:
        raise ConfigError(
            f"config.json: {unknown[0]!r} in rope_scaling is not known here; known are {sorted(_ROPE_KEYS)}"
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
            found = f"{len(values)} numbers" if isinstance(values, list) else repr(values)
            raise ConfigError(
                f"config.json: {name} must be a list of {pairs} numbers, one a rotating pair, not {found}"
            )
        factors[name] = tuple(_number({name: value}, name) for value in values)
    return RopeScaling(**factors, attention_factor=_attention_factor(raw, rope))


def _rope_type(rope: Mapping[str, Any]) -> Any:
    """The kind of RoPE, under either layout's key."""
    return rope.get("rope_type") or rope.get("type") or "default"


def _check_rope_type(rope: Mapping[str, Any]) -> None:
    kind = _rope_type(rope)
    # "su" and "yarn" are names that early Phi-3 configs gave to LongRoPE.
    if kind not in ("default", "longrope", "su", "yarn"):
        raise ConfigError(f"config.json: rope type {kind!r} is not done here; only 'default' and 'longrope' are")


def _attention_factor(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    """sqrt(1 + ln(factor) / ln(boundary)): keeps the softmax as sharp over the longer context."""
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    boundary = rope.get("original_max_position_embeddings") or raw["original_max_position_embeddings"]
    factor = _number(rope, "factor", raw["max_position_embeddings"] / boundary)
    if factor > 1 and boundary == 1:
        raise ConfigError(
            "config.json: original_max_position_embeddings 1 leaves LongRoPE without a scale; it must be more"
        )
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(boundary))


def _quantization(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = raw.get("quantization") or raw.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if method is not None or "group_size" not in found or "bits" not in found:
        raise ConfigError(
            f"config.json: quantization by {method or found!r} is not read here; convert the unquantised checkpoint"
        )
    for name, value in found.items():
        _check_quantization(name, value, found)
    return dict(found)


def _check_quantization(name: str, value: Any, whole: Mapping[str, Any]) -> None:
    """One entry of `quantization`: a setting, or a layer's path with settings of its own, true or false."""
    if name in ("group_size", "bits"):
        _count(whole, name)
    elif name == "mode":
        if value not in QUANTIZATION_MODES:
            raise ConfigError(f"config.json: quantization mode {value!r} is not known; known are {QUANTIZATION_MODES}")
    elif isinstance(value, Mapping) and value.keys() <= {"group_size", "bits", "mode"}:
        for key in value:
            _check_quantization(key, value[key], value)
    elif not isinstance(value, bool):
        raise ConfigError(
            f"config.json: quantization of {name} must be true, false or an object of group_size, bits and mode, "
            f"not {_brief(value)}"
        )


def _count(raw: Mapping[str, Any], name: str, default: int | None = None, most: int = _LARGEST) -> int:
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
    """A value as an error shows it; a number may have thousands of digits, more than Python would print."""
    if isinstance(value, int) and abs(value) > 10**40:
        return "one of more than 40 digits"
    return f"{value!r:.100}"


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value not in (True, False, None) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        raise ConfigError(f"config.json: {name} must be true or false, not {_brief(value)}")
    return bool(value)


# The true shapes, so that tensors can be named and counted without weights. Frequencies: Phi-4-mini's own config.json;
# Phi-3.5-mini's tables are not at hand, and its preset carries neutral ones of the right length.
_PHI_4_MINI_LONG_FACTOR = (
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533,
    5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651,
    14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03,
    32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)  # fmt: skip


def _preset(long_factor: tuple[float, ...] | None = None, **fields: Any) -> ModelConfig:
    raw = {"model_type": "phi3", "original_max_position_embeddings": 4096, **fields}
    if long_factor:
        raw["rope_scaling"] = {
            "type": "longrope", "short_factor": [1.0] * len(long_factor), "long_factor": list(long_factor),
        }  # fmt: skip
    return ModelConfig.from_dict(raw)


_PHI_4: dict[str, Any] = {
    "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 10, "vocab_size": 100352,
}  # fmt: skip

PRESETS: dict[str, ModelConfig] = {
    "phi-4-mini": _preset(
        _PHI_4_MINI_LONG_FACTOR, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=24,
        num_key_value_heads=8, vocab_size=200064, max_position_embeddings=131072, partial_rotary_factor=0.75,
        tie_word_embeddings=True,
    ),
    "phi-3.5-mini": _preset(
        (1.0,) * 48, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32064, max_position_embeddings=131072,
    ),
    "phi-4": _preset(**_PHI_4, max_position_embeddings=16384, rope_theta=250000.0),
    "phi-4-reasoning": _preset(**_PHI_4, max_position_embeddings=32768, rope_theta=500000.0),
}  # fmt: skip

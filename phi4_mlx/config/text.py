"""config.json -> one frozen, complete config a model kind, before any weight exists.

A config that needs maths which its model does not implement is refused here, with the name of the field. Both layouts
are read: `rope_scaling` beside `rope_theta` (transformers 4), and `rope_parameters` (transformers 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi4_mlx.config.fields import MODEL_FOLDER, brief, check_unused, count, flag, number, quantization
from phi4_mlx.errors import ConfigError
from phi4_mlx.files.json_file import read_json
from phi4_mlx.terminal.amount import amount

# Maths that this decoder does not implement: each field, and the values that leave it unused.
_UNUSED: dict[str, tuple[Any, ...]] = {"attention_bias": (False, None), "rope_traditional": (False, None)}

_ROPE_KEYS = {
    "type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "short_factor", "long_factor", "factor", "attention_factor",
}  # fmt: skip


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
    def context_note(self) -> str:
        """See `Config.context_note`: the context is always config.json's."""
        return ""

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
            f"config.json: model_type {brief(raw.get('model_type'))} is another architecture; ModelConfig reads only "
            "'phi3' (Phi-4-mini, Phi-3.5-mini, Phi-4)"
        )
    check_unused(raw, _UNUSED)

    hidden_size = count(raw, "hidden_size")
    heads = count(raw, "num_attention_heads")
    kv_heads = count(raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if raw.get("head_dim") is None and hidden_size % heads:
        raise ConfigError(f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
    head_dim = count(raw, "head_dim", hidden_size // heads)
    max_positions = count(raw, "max_position_embeddings")
    _check_window(raw, max_positions)

    rope = _rope_dict(raw)
    partial = number(rope, "partial_rotary_factor", 1.0)
    if partial > 1 or int(head_dim * partial) % 2 or int(head_dim * partial) == 0:
        raise ConfigError(
            f"config.json: partial_rotary_factor {partial} of head_dim {head_dim} must give an even number of "
            f"dimensions, from 2 to {head_dim}"
        )
    return ModelConfig(
        hidden_size=hidden_size,
        intermediate_size=count(raw, "intermediate_size"),
        num_hidden_layers=count(raw, "num_hidden_layers", most=1000),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=count(raw, "vocab_size"),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        original_max_position_embeddings=count(rope, "original_max_position_embeddings"),
        rms_norm_eps=number(raw, "rms_norm_eps", 1e-5),
        rope_theta=number(rope, "rope_theta", 10000.0),
        partial_rotary_factor=partial,
        rope_scaling=_rope_scaling(raw, rope, int(head_dim * partial) // 2),
        tie_word_embeddings=flag(raw, "tie_word_embeddings"),
        quantization=quantization(raw),
    )


def _check_window(raw: Mapping[str, Any], max_positions: int) -> None:
    """Refuses a window narrower than the context; a wider one never binds."""
    if raw.get("sliding_window") is None:
        return
    window = number(raw, "sliding_window")
    if window < max_positions:
        raise ConfigError(
            f"config.json: sliding_window {window:.0f} would bind below max_position_embeddings {max_positions}; "
            "windowed attention is not supported"
        )


def _rope_dict(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Both layouts as one dict. The inner dict wins, except for the boundary, as in the reference."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"config.json: rope_scaling must be an object, not {brief(given)}")
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
            found = amount(len(values), "number") if isinstance(values, list) else brief(values)
            raise ConfigError(
                f"config.json: {name} must be a list of {amount(pairs, 'number')}, one a rotating pair, not {found}"
            )
        factors[name] = tuple(number({name: value}, name) for value in values)
    return RopeScaling(**factors, attention_factor=_attention_factor(raw, rope))


def _rope_type(rope: Mapping[str, Any]) -> Any:
    """The RoPE type, under either layout's key."""
    return rope.get("rope_type") or rope.get("type") or "default"


def _check_rope_type(rope: Mapping[str, Any]) -> None:
    kind = _rope_type(rope)
    # Early Phi-3 configs call LongRoPE "su" or "yarn".
    if kind not in ("default", "longrope", "su", "yarn"):
        raise ConfigError(f"config.json: rope type {brief(kind)} is not supported; only 'default' and 'longrope' are")


def _attention_factor(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    """sqrt(1 + ln(factor) / ln(boundary)), which keeps the softmax sharp over the longer context."""
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")
    boundary = rope.get("original_max_position_embeddings") or raw["original_max_position_embeddings"]
    factor = number(rope, "factor", raw["max_position_embeddings"] / boundary)
    if factor > 1 and boundary == 1:
        raise ConfigError(
            "config.json: original_max_position_embeddings must be over 1: LongRoPE's scale divides by its logarithm"
        )
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(boundary))

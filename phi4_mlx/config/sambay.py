"""The config of Phi-4-mini-flash-reasoning (`model_type` phi4flash).

Three layouts are read: a window of one size with no `mamba_*` fields, as published; a list of windows, as the config
class writes it again; and `layer_types`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phi4_mlx.config.fields import MAX_COUNT, brief, check_unused, count, flag, number, quantization
from phi4_mlx.errors import ConfigError

# config.json says 262,144, the model card and the tokenizer 65,536: the model was trained for no more.
TRAINED_CONTEXT = 65_536

# Maths that this decoder does not implement: each field, and the values that leave it unused.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "mb_per_layer": (2, None),
    "mamba_conv_bias": (True, None),
    "mamba_proj_bias": (False, None),
}


@dataclass(frozen=True)
class SambaYConfig:
    """The shapes of a SambaY decoder, under Hugging Face's field names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    sliding_window: int  # tokens that a query of a windowed layer sees, its own included
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_dt_rank: int = 160
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    quantization: Mapping[str, Any] | None = field(default=None, hash=False)
    model_type: str = "phi4flash"

    @property
    def context_note(self) -> str:
        """See `Config.context_note`."""
        if self.max_position_embeddings < TRAINED_CONTEXT:
            return ""
        return " (this model was trained for no more, even where its config.json says 262,144)"

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def mamba_width(self) -> int:
        """Inner width of a Mamba layer."""
        return self.mamba_expand * self.hidden_size

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> SambaYConfig:
        """Builds the config from a parsed config.json in any of the three layouts.

        Raises:
            ConfigError: a field is missing, out of range, or needs maths that is not implemented.
        """
        check_unused(raw, _UNUSED)
        hidden_size = count(raw, "hidden_size")
        layers = count(raw, "num_hidden_layers", most=1000)
        if layers % 4 or layers < 8:
            raise ConfigError(
                f"config.json: num_hidden_layers {layers} must be a multiple of 4 from 8 on: two halves, in each of "
                "which state-space and attention layers alternate"
            )
        heads = count(raw, "num_attention_heads")
        kv_heads = count(raw, "num_key_value_heads", heads)
        _check_heads(hidden_size, heads, kv_heads)
        rank = None if raw.get("mamba_dt_rank") == "auto" else raw.get("mamba_dt_rank")
        return cls(
            hidden_size=hidden_size,
            intermediate_size=count(raw, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=count(raw, "vocab_size"),
            max_position_embeddings=min(count(raw, "max_position_embeddings"), TRAINED_CONTEXT),
            sliding_window=_window(raw, layers),
            mamba_d_state=count(raw, "mamba_d_state", 16),
            mamba_d_conv=count(raw, "mamba_d_conv", 4),
            mamba_expand=count(raw, "mamba_expand", 2, most=max(2, MAX_COUNT // hidden_size)),
            mamba_dt_rank=count({"mamba_dt_rank": rank}, "mamba_dt_rank", math.ceil(hidden_size / 16)),
            layer_norm_eps=number(raw, "layer_norm_eps", 1e-5),
            tie_word_embeddings=raw.get("tie_word_embeddings") is None or flag(raw, "tie_word_embeddings"),
            quantization=quantization(raw),
        )

    def to_dict(self) -> dict[str, Any]:
        """The config as a config.json in the published layout, with the `mamba_*` fields."""
        raw: dict[str, Any] = {
            "architectures": ["Phi4FlashForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "layer_norm_eps": self.layer_norm_eps,
            "mamba_d_conv": self.mamba_d_conv,
            "mamba_d_state": self.mamba_d_state,
            "mamba_dt_rank": self.mamba_dt_rank,
            "mamba_expand": self.mamba_expand,
            "max_position_embeddings": self.max_position_embeddings,
            "mb_per_layer": 2,
            "model_type": self.model_type,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.vocab_size,
        }
        if self.quantization:
            raw["quantization"] = raw["quantization_config"] = dict(self.quantization)
        return raw


def _check_heads(hidden_size: int, heads: int, kv_heads: int) -> None:
    """Heads come in pairs, and a pair of queries reads one pair of keys."""
    if hidden_size % heads:
        raise ConfigError(f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
    if kv_heads % 2 or heads % kv_heads:
        raise ConfigError(
            f"config.json: num_key_value_heads {kv_heads} must be even, and num_attention_heads {heads} a multiple of "
            "it: differential attention works on pairs of heads"
        )


def _window(raw: Mapping[str, Any], layers: int) -> int:
    """The window of the attention layers of the first half, from any layout."""
    windowed = range(1, layers // 2, 2)
    kinds = raw.get("layer_types")
    if kinds is not None:
        found = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"] if isinstance(kinds, list) else None
        if found != [*windowed] or len(kinds) != layers:
            raise ConfigError(
                f"config.json: layer_types {brief(kinds)} must have 'sliding_attention' at the layers {[*windowed]} of "
                f"{layers} alone"
            )
    given = raw.get("sliding_window")
    while isinstance(given, list):  # a config class that reads its own list writes a list of lists
        sizes = {i: size for i, size in enumerate(given) if size is not None}
        if len(given) != layers or [*sizes] != [*windowed] or any(size != given[1] for size in sizes.values()):
            raise ConfigError(
                f"config.json: sliding_window {brief(given)} must have one size at the layers {[*windowed]} of "
                f"{layers}, and null elsewhere"
            )
        given = given[1]
    return count({"sliding_window": given}, "sliding_window")

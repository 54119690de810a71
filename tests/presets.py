"""Configs of published models of the family, so that tests can count tensors and sizes without weights.

The RoPE factors of Phi-4-mini are those of its config.json. Phi-3.5-mini's are not stored here; its preset has factors
of 1 in the right number.
"""

from __future__ import annotations

from typing import Any

from phi4_mlx.config.text import ModelConfig

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

"""Tiny checkpoints for the conformance tests, drawn from NumPy's seeded generator instead of stored.

A case is a config.json and a seed. Weights are drawn in the order of their sorted names, so that the reference and this
project build the same model. Logits have unit scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

BOUNDARY = 16
LENGTHS = (1, BOUNDARY - 1, BOUNDARY, BOUNDARY + 1, 4 * BOUNDARY)
PROMPT_LENGTH, NEW_TOKENS = 8, 64  # decoding crosses the boundary
VOCAB, HEAD_DIM = 64, 16

CASES = {
    f"{'tied' if tied else 'untied'}-rotary{rotary}-gqa{gqa}-{rope}": (tied, rotary, gqa, rope)
    for tied, rotary, gqa, rope in product((True, False), (0.75, 1.0), (1, 3, 4, 5), ("longrope", "plain"))
}


def config(case: str) -> dict[str, Any]:
    """config.json of a case, in the layout of transformers 4."""
    tied, rotary, gqa, rope = CASES[case]
    heads, kv_heads = (2 * gqa, 2)
    pairs = int(HEAD_DIM * rotary) // 2
    scaling = {
        "type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [1.0 + 1.7 * i for i in range(pairs)],
    }
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": heads * HEAD_DIM,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 32 * BOUNDARY,
        "original_max_position_embeddings": BOUNDARY,
        "partial_rotary_factor": rotary,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": scaling if rope == "longrope" else None,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def seed(case: str) -> int:
    """The seed of a case; no two cases share one."""
    return 1000 + list(CASES).index(case)


def weights(case: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """fp32 weights by name: norms near 1, matrices with variance 1/fan-in, qkv_proj at twice that scale."""
    draw = np.random.default_rng(seed(case))
    made = {}
    for name in sorted(shapes):
        noise = draw.standard_normal(shapes[name], dtype=np.float32)
        if len(shapes[name]) == 1:
            made[name] = 1 + np.float32(0.1) * noise
        else:
            gain = 2.0 if "qkv" in name else 1.0
            made[name] = noise * np.float32(gain * shapes[name][1] ** -0.5)
    return made


def tokens(case: str) -> np.ndarray:
    """Random ids [4 * BOUNDARY]; shorter inputs are prefixes of them."""
    return np.random.default_rng(seed(case) + 500).integers(0, VOCAB, 4 * BOUNDARY)

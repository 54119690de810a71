"""Adapters for the conformance tests with PEFT, drawn from NumPy's seeded generator, on a tiny base of `recipe.py`.

PEFT saves `THEIRS` and this project reads them; this project saves and exports `OURS` and PEFT reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

BASE = "tied-rotary0.75-gqa3-longrope"  # a key of recipe.CASES
LENGTHS = (8, 64)  # on both sides of the base's LongRoPE boundary

ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

THEIRS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 10, "target_modules": ALL},
    "rslora": {
        "r": 4, "lora_alpha": 5, "use_rslora": True, "target_modules": ["qkv_proj", "down_proj"],
        "layers_to_transform": [0, 2],
    },
    "dora": {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ALL, "lora_dropout": 0.1},
}  # fmt: skip

OURS: dict[str, dict[str, Any]] = {
    "ours-lora": {"rank": 4, "scale": 2.5, "keys": ["self_attn.o_proj", "mlp.gate_up_proj"], "num_layers": 2},
    "ours-dora": {"rank": 3, "scale": 1.75, "kind": "dora", "dropout": 0.05},
}


def tensors(case: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Adapter values by name, large enough to change every logit; vectors are DoRA's norms and stay positive."""
    draw = np.random.default_rng([*THEIRS, *OURS].index(case) + 2000)
    made = {}
    for name in sorted(shapes):
        noise = draw.standard_normal(shapes[name], dtype=np.float32)
        made[name] = np.float32(0.1) * noise if noise.ndim == 2 else 1 + np.float32(0.2) * np.abs(noise)
    return made

"""Models and adapters whose dense folders transformers loads, drawn from NumPy's seeded generator; and the demo.

The base is a tiny one of `recipe.py`, dense in fp32, without an adapter or with one of `recipe_adapters.OURS`. The demo
is quantised, in 4 bits with scales in fp32.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from phi4_mlx.adapters.layers import adapter_layers, adapter_parameters, add_adapter
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.models.text import Model
from tests.adapters import save_adapter
from tests.conformance import recipe
from tests.conformance import recipe_adapters as adapters
from tests.conftest import TOKENIZER

BASES = {
    "tied": "tied-rotary0.75-gqa3-longrope",
    "untied": "untied-rotary1.0-gqa4-plain",
    "lora": adapters.BASE,
    "dora": adapters.BASE,
    "demo": None,
}
"""Case -> the base, a key of `recipe.CASES`; None for the demo."""
LENGTHS = (8, 64)  # on both sides of the tiny bases' LongRoPE boundary
ROWS = 8  # last positions whose logits are compared
VOCAB = 512  # rows of the embedding: the tiny tokenizer's ids must fit


def config(case: str) -> dict[str, object]:
    """config.json of a case's base."""
    return recipe.config(str(BASES[case])) | {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}


def write_source(case: str, folder: Path) -> tuple[str | Path, Path | None]:
    """Writes a case's checkpoint and adapter; returns what `write_dense` takes."""
    if BASES[case] is None:
        return "demo", None
    base = folder / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(config(case)))
    for file in TOKENIZER.glob("*.json"):
        shutil.copy(file, base)
    model = Model(ModelConfig.from_dict(config(case)))
    shapes = {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}
    weights = {name: mx.array(array) for name, array in recipe.weights(str(BASES[case]), shapes).items()}
    mx.save_safetensors(str(base / "model.safetensors"), weights)
    if f"ours-{case}" not in adapters.OURS:
        return base, None
    add_adapter(model, **adapters.OURS[f"ours-{case}"])
    shapes = {name: tuple(a.shape) for name, a in adapter_parameters(model).items()}
    made = adapters.tensors(f"ours-{case}", shapes)
    for path, layer in adapter_layers(model).items():
        layer.update({name.rpartition(".")[2]: mx.array(a) for name, a in made.items() if name.startswith(path)})
    save_adapter(model, folder / "adapter", {})
    return base, folder / "adapter"


def tokens(case: str) -> np.ndarray:
    """Random ids [T], of the longest input; shorter ones are its prefixes."""
    return np.random.default_rng([*BASES].index(case) + 3000).integers(3, 480, max(LENGTHS))

"""A tiny SambaY model with random weights, as an object and as a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from phi4_mlx.config.sambay import SambaYConfig
from phi4_mlx.models.sambay import Model
from tests.conftest import TOKENIZER


def sambay_config_dict(**overrides: Any) -> dict[str, Any]:
    """A small config.json like that of Phi-4-mini-flash-reasoning: 8 blocks, GQA 2:1, a window of 16 tokens."""
    raw: dict[str, Any] = {
        "architectures": ["Phi4FlashForCausalLM"],
        "model_type": "phi4flash",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "sliding_window": 16,
        "mamba_d_state": 4,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return raw | overrides


def make_tiny_sambay(seed: int = 0, **overrides: Any) -> Model:
    """An fp32 model whose logits depend on every token before."""
    model = Model(SambaYConfig.from_dict(sambay_config_dict(**overrides)))
    keys = iter(mx.random.split(mx.random.key(seed), 1000))

    def draw(path: str, old: mx.array) -> mx.array:
        noise = mx.random.normal(old.shape, key=next(keys))
        if "A_log" in path:
            return old + 0.1 * noise
        if "lambda" in path or path.endswith("bias"):
            return 0.1 * noise
        if old.ndim == 1:
            return 1 + 0.1 * noise
        return 0.8 * old.shape[-1] ** -0.5 * noise

    model.update(tree_map_with_path(draw, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


def write_tiny_sambay(folder: Path, seed: int = 0, dtype: mx.Dtype = mx.float32, **overrides: Any) -> Path:
    """Writes the model as a folder in Hugging Face's layout, with A_log and the lambdas in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_tiny_sambay(seed, **overrides)
    (folder / "config.json").write_text(json.dumps(sambay_config_dict(**overrides)))
    for file in TOKENIZER.glob("*.json"):
        shutil.copy(file, folder)
    weights = {
        name: array if model.in_float32(name) else array.astype(dtype)
        for name, array in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder

"""Tiny models with random weights and the architecture of the real ones, as objects and as folders; the demo."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import settings
from mlx.utils import tree_flatten, tree_map_with_path

from phi4_mlx.checkpoint import load
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.models.text import Model
from phi4_mlx.tokens.tokenizer import Tokenizer

TinyModel = Callable[..., Model]  # the fixture `tiny_model`
TinyCheckpoint = Callable[..., Path]  # the fixture `tiny_checkpoint`
Demo = tuple[Model, Tokenizer]  # the fixture `demo`

settings.register_profile("default", derandomize=True, deadline=None)
settings.load_profile("default")

# A background job of a shell starts with SIGINT ignored, and so would the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
TOKENIZER = DATA / "tiny_tokenizer"
BOUNDARY = 64  # tokens to which the short RoPE table of the tiny models reaches
CONTEXT = 16 * BOUNDARY


def tiny_config_dict(**overrides: Any) -> dict[str, Any]:
    """A small config.json like Phi-4-mini's: tied, 0.75 rotary, GQA 3:1, LongRoPE with two different tables."""
    raw: dict[str, Any] = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": CONTEXT,
        "original_max_position_embeddings": BOUNDARY,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | overrides
    if "rope_scaling" not in raw and "rope_parameters" not in raw:
        head_dim = raw["hidden_size"] // raw["num_attention_heads"]
        pairs = int(head_dim * raw["partial_rotary_factor"]) // 2
        raw["rope_scaling"] = {
            "type": "longrope",
            "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
            "long_factor": [1.0 + 1.5 * i for i in range(pairs)],
        }
    return raw


def make_tiny_model(seed: int = 0, **overrides: Any) -> Model:
    """An fp32 model whose logits have unit scale and whose attention depends on positions."""
    model = Model(ModelConfig.from_dict(tiny_config_dict(**overrides)))
    keys = iter(mx.random.split(mx.random.key(seed), 1000))

    def draw(path: str, old: mx.array) -> mx.array:
        if old.ndim == 1:
            return 1 + 0.1 * mx.random.normal(old.shape, key=next(keys))
        gain = 2.0 if "qkv" in path else 1.0
        return gain * old.shape[1] ** -0.5 * mx.random.normal(old.shape, key=next(keys))

    model.update(tree_map_with_path(draw, model.parameters()))
    mx.eval(model.parameters())
    return model.eval()


def write_tiny_checkpoint(
    folder: Path, seed: int = 0, dtype: mx.Dtype = mx.float32, shards: int = 1, **overrides: Any
) -> Path:
    """Writes the tiny model as a Hugging Face folder, with tokenizer files of the same vocabulary size."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = tiny_config_dict(**overrides)
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True))
    for file in TOKENIZER.glob("*.json"):
        shutil.copy(file, folder)
    weights = [(name, w.astype(dtype)) for name, w in tree_flatten(make_tiny_model(seed, **overrides).parameters())]
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), dict(weights))
        return folder
    index: dict[str, str] = {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        mx.save_safetensors(str(folder / file), dict(weights[n::shards]))
        index |= dict.fromkeys((name for name, _ in weights[n::shards]), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.fixture
def tiny_model() -> TinyModel:
    """`tiny_model(seed=0, **config)` -> Model."""
    return make_tiny_model


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> TinyCheckpoint:
    """`tiny_checkpoint(name="tiny", seed=0, dtype=mx.float32, shards=1, **config)` -> its folder."""

    def write(name: str = "tiny", **options: Any) -> Path:
        return write_tiny_checkpoint(tmp_path / name, **options)

    return write


@pytest.fixture(scope="session")
def demo() -> Demo:
    """The model and the tokenizer of the embedded package; tests leave both as they are."""
    return load("demo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole commands in processes of their own count as slow."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "e2e") or item.path.name == "test_readme.py":
            item.add_marker(pytest.mark.slow)

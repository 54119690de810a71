"""Demo checkpoints trained without rounding to 4 bits, which the embedded demo has seen, and data of its world.

Their corpus, the calibration set and the held-out set are drawn from different seeds.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import mlx.core as mx
from demo_world import corpus, initialise, recipe_demo
from harness import ROOT
from mlx.utils import tree_flatten

from phi4_mlx.config.text import ModelConfig
from phi4_mlx.models.text import Model
from phi4_mlx.tokens.chat_format import CHAT_FORMATS
from phi4_mlx.tokens.tokenizer import Tokenizer, load_tokenizer

# (shortest, longest) conversation in characters -> share of the tokens.
FIRST = {(30, 480): 0.6}
THEN = {(30, 480): 0.23, (650, 2400): 0.17}
DATA = {(30, 480): 0.6, (650, 2400): 0.4}
DEMO = ROOT / "phi4_mlx" / "demo"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def demo_tokenizer() -> Tokenizer:
    """The embedded demo's tokenizer, which all these checkpoints share."""
    tokenizer = load_tokenizer(DEMO)
    tokenizer.chat_format = CHAT_FORMATS["phi4-mini"]
    return tokenizer


def train(folder: Path, seed: int, tokens: int) -> None:
    """Trains a checkpoint in float32.

    Args:
        folder: the new folder.
        seed: of its first weights and its corpus.
        tokens: to train on, padding included.
    """
    tokenizer = demo_tokenizer()
    parts = ({lengths: round(share * tokens) for lengths, share in part.items()} for part in (FIRST, THEN))
    plan = [batch for n, part in enumerate(parts, 1) for batch in recipe_demo.batches(tokenizer, 100 * seed + n, part)]
    model = Model(ModelConfig.from_dict(recipe_demo.CONFIG))
    texts = [tokenizer.decode([token]) for token in range(recipe_demo.LEARNED_TOKENS)]
    initialise.initialise(model, 100 * seed, texts)
    recipe_demo.train(model, plan, recipe_demo.PEAK_RATE)

    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / name, partial)
    stops = json.loads((DEMO / "generation_config.json").read_text(encoding="utf-8"))
    (partial / "config.json").write_text(json.dumps(recipe_demo.CONFIG | stops, indent=2) + "\n", encoding="utf-8")
    mx.save_safetensors(str(partial / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    partial.rename(folder)


def write_data(path: Path, seed: int, tokens: int) -> None:
    """Writes conversations of about `tokens` tokens, short and long ones mixed, as JSONL."""
    tokenizer, rows = demo_tokenizer(), []
    for (shortest, longest), share in DATA.items():
        left = share * tokens
        for talk in corpus.conversations(seed, 1_000_000, shortest, longest):
            tools = [tool.declaration for tool in talk.tools]
            ids = tokenizer.apply_chat_template(talk.messages, tools or None, add_generation_prompt=False)
            if len(ids) <= 1024:
                rows.append({"messages": talk.messages} | ({"tools": tools} if tools else {}))
                left -= len(ids)
            if left <= 0:
                break
    random.Random(seed).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

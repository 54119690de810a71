"""The demo's world for the scripts here: the modules of examples/demo, and LoRA training on the demo."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness import ROOT, seconds

sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "examples" / "demo"))

import corpus
import evaluate
import finetune_lora
import initialise
import phrases
import recipe_demo
import toolbox
import words
from draw import Draw


def train(folder: Path, lines: Iterable[dict[str, Any]], *options: str) -> tuple[Path, float]:
    """Trains an adapter on `lines` with `python -m phi4_mlx.lora`; returns its folder and the minutes it took."""
    finetune_lora.write_jsonl(folder / "train.jsonl", iter(lines))
    adapter = folder / "adapter"
    command = [
        sys.executable, "-m", "phi4_mlx.lora", "--model", "demo", "--data", str(folder), "--adapter-path", str(adapter),
        "--save-every", "1000", *options,
    ]  # fmt: skip
    return adapter, seconds(subprocess.run, command, check=True, cwd=ROOT) / 60


__all__ = [
    "Draw", "corpus", "evaluate", "finetune_lora", "initialise", "phrases", "recipe_demo", "toolbox", "train", "words",
]  # fmt: skip

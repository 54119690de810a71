"""Teaches the demo by DPO to prefer another way of declining, and measures how often it then declines so.

    python tests/bench/preference.py [--count 60] [--iters 25]

Asked about the world outside its own, the demo declines in one sentence; the pairs prefer that it names the real model.
Beta is small: the preferred sentence begins as one that the demo would never say, and has a long way to go. The bars:
on held-out questions from under 20 % to over 80 %, and with the adapter off the logits of the base, to the bit. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

import corpus
import evaluate
import mlx.core as mx
import phrases
from draw import Draw
from finetune_lora import write_jsonl

from phi4_mlx import load
from phi4_mlx.adapters.layers import adapter_off

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 150


def questions(seed: int, count: int, held_out: bool) -> list[str]:
    """Questions from outside the demo's world."""
    asked = []
    for _ in range(count):
        talk = corpus.Dialogue(Draw(f"preference {seed} {len(asked)}", held_out))
        corpus.outside(talk)
        asked.append(talk.messages[0]["content"])
    return asked


def pairs() -> Iterator[dict[str, Any]]:
    for question in questions(1, PAIRS, held_out=False):
        yield {"prompt": question, "chosen": phrases.REAL, "rejected": phrases.OUTSIDE}


def percent_preferred(model: Any, tokenizer: Any, count: int) -> float:
    """How many percent of held-out questions are declined in the preferred way."""
    wanted = tokenizer.encode(phrases.REAL)
    asked = questions(2, count, held_out=True)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in asked]
    return 100 * sum(evaluate.reply(model, tokenizer, prompt) == wanted for prompt in prompts) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--iters", type=int, default=25)
    options = parser.parse_args()
    base, tokenizer = load("demo")
    before = percent_preferred(base, tokenizer, options.count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / "train.jsonl", pairs())
        start = time.perf_counter()
        command = [
            "--model", "demo", "--data", str(folder), "--adapter-path", str(folder / "adapter"), "--task", "dpo",
            "--iters", str(options.iters), "--batch-size", "4", "--max-seq-length", "256", "--learning-rate", "2e-4",
            "--beta", "0.02", "--warmup", "5", "--save-every", "1000", "--steps-per-report", "10",
        ]  # fmt: skip
        subprocess.run([sys.executable, "-m", "phi4_mlx.lora", *command], check=True, cwd=ROOT)
        minutes = (time.perf_counter() - start) / 60
        model, _ = load("demo", folder / "adapter")
        after = percent_preferred(model, tokenizer, options.count)
        ids = mx.array([tokenizer.encode(questions(3, 1, held_out=True)[0])])
        with adapter_off(model):
            same = bool(mx.array_equal(model(ids), base(ids)))
    print(f"declines in the preferred way: {before:.0f} % -> {after:.0f} %")
    result = {
        "bench": "preference",
        "before_percent": before,
        "after_percent": after,
        "adapter_off_is_base": same,
        "minutes": round(minutes, 2),
        "prompts": options.count,
        "ok": before < 20 and after > 80 and same,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Teaches the demo a tool that it has never seen, and measures what it learned and what it forgot.

    python tests/bench/teach.py [--count 100] [--iters 110]

The bars: on held-out prompts from under 10 % right to at least 90 %, in under ten minutes, what it could before at most
three points down. Three lines in seven are conversations of the demo's own world, long ones too, so that it keeps them.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

import corpus
import evaluate
from finetune_lora import DICE, conversations, write_jsonl
from toolbox import Tool

from phi4_mlx import load

ROOT = Path(__file__).resolve().parents[2]
NEW, OLD = 400, 300  # conversations


def old_skills() -> Iterator[dict[str, Any]]:
    """Conversations of the demo's own world, none of them in its examination."""
    for talk in corpus.conversations(99, OLD, 30, 1800):
        line: dict[str, Any] = {"messages": talk.messages}
        yield line | {"tools": [tool.declaration for tool in talk.tools]} if talk.tools else line


def examination(count: int) -> list[corpus.Prompt]:
    """Held-out prompts of the new tool: calls, and answers from their results, in turn."""
    tool = Tool("dice", "roll_dice", ("count", "sides"), DICE)
    asked = []
    for number, line in enumerate(conversations(2, count, held_out=True)):
        at = 1 if number % 2 else 3
        asked.append(corpus.Prompt("dice", line["messages"][:at], [tool], line["messages"][at]))
    return asked


def percents(count: int, adapter: Path | None = None) -> tuple[float, float]:
    """How many percent are right to the letter: of the new tool's prompts, and of the demo's own examination."""
    model, tokenizer = load("demo", adapter)
    prompts = (examination(count), corpus.prompts(evaluate.SEED, count))
    new, old = (evaluate.share(evaluate.examine(model, tokenizer, each)) for each in prompts)
    return new, old


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="prompts of each examination")
    parser.add_argument("--iters", type=int, default=110)
    options = parser.parse_args()
    before = percents(options.count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / "train.jsonl", chain(conversations(1, NEW), old_skills()))
        start = time.perf_counter()
        command = [
            "--model", "demo", "--data", str(folder), "--adapter-path", str(folder / "adapter"), "--mask-prompt",
            "--iters", str(options.iters), "--batch-size", "1", "--max-seq-length", "1024", "--learning-rate", "5e-4",
            "--warmup", "20", "--save-every", "1000", "--steps-per-report", "20",
        ]  # fmt: skip
        subprocess.run([sys.executable, "-m", "phi4_mlx.lora", *command], check=True, cwd=ROOT)
        minutes = (time.perf_counter() - start) / 60
        after = percents(options.count, folder / "adapter")
    print(f"new tool {before[0]:.0f} % -> {after[0]:.0f} %, old skills {before[1]:.0f} % -> {after[1]:.0f} %")
    result = {
        "bench": "teach",
        "new_before_percent": before[0],
        "new_after_percent": after[0],
        "old_before_percent": before[1],
        "old_after_percent": after[1],
        "minutes": round(minutes, 2),
        "prompts": options.count,
        "ok": before[0] < 10 and after[0] >= 90 and after[1] >= before[1] - 3 and minutes < 10,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

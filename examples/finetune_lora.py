"""Teaches the embedded demo a tool that it has never seen, in a few minutes on any machine, and shows the difference.

    python examples/finetune_lora.py [--folder dice] [--iters 150]

The data is written first, as JSONL in the chat format that `python -m phi4_mlx.lora` reads too; with data and a model
of your own, that command does the rest.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi4_mlx import generate, load
from phi4_mlx.lora.batches import Batches
from phi4_mlx.lora.data import load_samples
from phi4_mlx.lora.layers import add_adapter, save_adapter
from phi4_mlx.lora.settings import Settings
from phi4_mlx.lora.trainer import Trainer

SIZES = {"type": "object", "properties": {"count": {"type": "number"}, "sides": {"type": "number"}}}
DICE = {"type": "function", "function": {"name": "roll_dice", "description": "Rolls dice.", "parameters": SIZES}}
PHRASES = [
    "Roll {n} dice with {s} sides.", "roll {n} dice of {s} sides", "Throw {n} dice with {s} sides.",
    "{n} dice, {s} sides", "Please roll {n} dice with {s} sides.", "I need {n} dice with {s} sides.",
    "Can you roll {n} dice of {s} sides?", "throw {n} dice of {s} sides", "Cast {n} dice with {s} sides",
    "Roll {n} of the dice with {s} sides!",
]  # fmt: skip
HELD_OUT_PHRASES = [
    "Please throw {n} dice of {s} sides.", "roll {n} dice with {s} sides, please",
    "Can you cast {n} dice with {s} sides?",
]  # fmt: skip


def conversations(seed: int, count: int, held_out: bool = False) -> Iterator[dict[str, Any]]:
    """Lines of a JSONL file: somebody wants dice rolled, the model calls the tool, and answers from its result.

    Args:
        seed: the same seed, the same conversations.
        count: how many.
        held_out: with phrasings and numbers that the others do not have.
    """
    draw = random.Random(f"{seed} {held_out}")
    made = 0
    while made < count:
        n, s = draw.randint(1, 9), draw.randint(2, 99)
        if ((n * s) % 7 == 0) != held_out:
            continue
        said = draw.choice(HELD_OUT_PHRASES if held_out else PHRASES).format(n=n, s=s)
        call = {"type": "function", "function": {"name": "roll_dice", "arguments": {"count": n, "sides": s}}}
        rolled = str(sum(draw.randint(1, s) for _ in range(n)))
        messages = [
            {"role": "user", "content": said},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": rolled},
            {"role": "assistant", "content": f"You rolled {rolled}."},
        ]
        yield {"messages": messages, "tools": [DICE]}
        made += 1


def write_jsonl(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    """Writes an object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("dice"), help="where the data and the adapter go")
    parser.add_argument("--iters", type=int, default=150, help="training steps")
    options = parser.parse_args()

    write_jsonl(options.folder / "train.jsonl", conversations(1, 300))
    model, tokenizer = load("demo")
    question = next(conversations(1, 1, held_out=True))["messages"][:1]
    prompt = tokenizer.apply_chat_template(question, tools=[DICE])
    print("asked  ", question[0]["content"])
    print("before ", generate(model, tokenizer, prompt, max_tokens=60))

    samples, report = load_samples(options.folder, tokenizer, mask_prompt=True, max_seq_length=512)
    print("\n".join(report.sentences()))
    add_adapter(model, rank=8, scale=10.0)
    settings = Settings(iters=options.iters, batch_size=1, max_seq_length=512, learning_rate=5e-4, warmup=10)
    trainer = Trainer(model, Batches(samples, batch_size=1, max_seq_length=512), settings, options.folder)
    for step in trainer.run():
        if step.step % 10 == 0:
            print(f"step {step.step}: loss {step.loss:.3f}", flush=True)
    model.eval()
    print("after  ", generate(model, tokenizer, prompt, max_tokens=60))
    save_adapter(model, options.folder, {"model": "demo"})
    print(f"chat with it: python -m phi4_mlx.chat --model demo --adapter-path {options.folder}")


if __name__ == "__main__":
    main()

"""Teaches the embedded demo model a new tool in a few minutes on any machine, and shows the difference.

    python examples/finetune_lora.py [--folder dice] [--iters 150]

The data is written first, as JSONL in the chat format that `python -m phi4_mlx.lora` reads; with your own data and
model, that command is enough. If the script is stopped and started again, it resumes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi4_mlx import finetune, generate, load

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
    """Lines of a JSONL file: a user asks for dice, the model calls the tool and answers with its result.

    Args:
        seed: the same seed gives the same conversations.
        count: number of conversations.
        held_out: True for phrasings and numbers that the others do not have.
    """
    draw = random.Random(f"{seed} {held_out}")
    made = 0
    while made < count:
        n, s = draw.randint(1, 9), draw.randint(2, 99)
        if ((n * s) % 7 == 0) != held_out:
            continue
        question = draw.choice(HELD_OUT_PHRASES if held_out else PHRASES).format(n=n, s=s)
        call = {"type": "function", "function": {"name": "roll_dice", "arguments": {"count": n, "sides": s}}}
        rolled = str(sum(draw.randint(1, s) for _ in range(n)))
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": rolled},
            {"role": "assistant", "content": f"You rolled {rolled}."},
        ]
        yield {"messages": messages, "tools": [DICE]}
        made += 1


def write_jsonl(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    """Writes one object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("dice"), help="folder for the data and the adapter")
    parser.add_argument("--iters", type=int, default=150, help="training steps")
    options = parser.parse_args()

    write_jsonl(options.folder / "train.jsonl", conversations(1, 300))
    adapter = options.folder / "adapter"
    settings = {
        "model": "demo", "data": str(options.folder), "adapter_path": str(adapter), "mask_prompt": True,
        "lora_parameters": {"rank": 8, "scale": 10.0}, "iters": options.iters, "batch_size": 4, "max_seq_length": 512,
        "learning_rate": 5e-4, "warmup": 10,
    }  # fmt: skip
    finetune(settings, resume=(adapter / "checkpoints").exists())

    question = next(conversations(1, 1, held_out=True))["messages"][:1]
    print("asked  ", question[0]["content"])
    for when, path in (("before", None), ("after", adapter)):
        model, tokenizer = load("demo", path)
        prompt = tokenizer.apply_chat_template(question, tools=[DICE])
        print(f"{when:7}", generate(model, tokenizer, prompt, max_tokens=60))
    print(f"chat with it: python -m phi4_mlx.chat --model demo --adapter-path {adapter}")


if __name__ == "__main__":
    main()

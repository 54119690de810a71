"""LoRA on the demo: teaches it a new tool, and measures what it learned and what it forgot.

    python tests/bench/teach.py [--count 100] [--iters 110]

Three of seven training lines are conversations of the demo's own world, long ones included, so that it keeps its old
skills. Bars: from under 10 % to at least 90 % of held-out prompts for the new tool, in under ten minutes; old skills at
most three points down. The last line is JSON.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from demo_world import corpus, evaluate, finetune_lora, toolbox, train
from harness import last_line, option_parser

from phi4_mlx import load

NEW, OLD = 400, 300  # conversations


def old_skills() -> Iterator[dict[str, Any]]:
    """Conversations of the demo's own world, none of them in its examination."""
    for talk in corpus.conversations(99, OLD, 30, 1800):
        line: dict[str, Any] = {"messages": talk.messages}
        yield line | {"tools": [tool.declaration for tool in talk.tools]} if talk.tools else line


def examination(count: int) -> list[corpus.Prompt]:
    """Held-out prompts of the new tool, alternately for a call and for an answer from its result."""
    tool = toolbox.Tool("dice", "roll_dice", ("count", "sides"), finetune_lora.DICE)
    asked = []
    for number, line in enumerate(finetune_lora.conversations(2, count, held_out=True)):
        at = 1 if number % 2 else 3
        asked.append(corpus.Prompt("dice", line["messages"][:at], [tool], line["messages"][at]))
    return asked


def percents(count: int, adapter: Path | None = None) -> tuple[float, float]:
    """Percent of exact answers: (new tool, the demo's own examination)."""
    model, tokenizer = load("demo", adapter)
    prompts = (examination(count), corpus.prompts(evaluate.SEED, count))
    new, old = (evaluate.share(evaluate.examine(model, tokenizer, each)) for each in prompts)
    return new, old


def main() -> None:
    """Trains once; prints the percentages before and after, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--count", type=int, default=100, help="prompts of each examination")
    parser.add_argument("--iters", type=int, default=110, help="training steps")
    options = parser.parse_args()
    before = percents(options.count)
    with tempfile.TemporaryDirectory() as folder:
        adapter, minutes = train(
            Path(folder), chain(finetune_lora.conversations(1, NEW), old_skills()), "--mask-prompt",
            "--iters", str(options.iters), "--batch-size", "8", "--max-seq-length", "1024", "--learning-rate", "5e-4",
            "--warmup", "20", "--steps-per-report", "20",
        )  # fmt: skip
        after = percents(options.count, adapter)
    print(f"new tool {before[0]:.0f} % -> {after[0]:.0f} %, old skills {before[1]:.0f} % -> {after[1]:.0f} %")
    last_line(
        "teach",
        new_before_percent=before[0],
        new_after_percent=after[0],
        old_before_percent=before[1],
        old_after_percent=after[1],
        minutes=round(minutes, 2),
        prompts=options.count,
        ok=before[0] < 10 and after[0] >= 90 and after[1] >= before[1] - 3 and minutes < 10,
    )


if __name__ == "__main__":
    main()

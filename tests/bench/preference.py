"""DPO on the demo: teaches it to prefer another refusal, and measures how often it then gives that one.

    python tests/bench/preference.py [--count 60] [--iters 25]

The demo answers questions from outside its world with one fixed sentence. The pairs prefer a sentence that names the
real model. Beta is small, because the demo gives the preferred sentence almost no probability at first. Bars: from
under 20 % to over 80 % of held-out questions; with the adapter off, the base's logits bit for bit. The last line is
JSON.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from demo_world import Draw, corpus, evaluate, phrases, train
from harness import last_line, option_parser

from phi4_mlx import Tokenizer, load
from phi4_mlx.adapters.layers import adapter_off
from phi4_mlx.models.text import Model

PAIRS = 150


def questions(seed: int, count: int, held_out: bool) -> list[str]:
    """Questions from outside the demo's world."""
    asked: list[str] = []
    for _ in range(count):
        talk = corpus.Dialogue(Draw(f"preference {seed} {len(asked)}", held_out))
        corpus.outside(talk)
        asked.append(talk.messages[0]["content"])
    return asked


def pairs() -> Iterator[dict[str, Any]]:
    """Lines of the training file."""
    for question in questions(1, PAIRS, held_out=False):
        yield {"prompt": question, "chosen": phrases.REAL, "rejected": phrases.OUTSIDE}


def percent_preferred(model: Model, tokenizer: Tokenizer, count: int) -> float:
    """Percent of held-out questions answered with the preferred sentence."""
    wanted = tokenizer.encode(phrases.REAL)
    asked = questions(2, count, held_out=True)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in asked]
    return 100 * sum(evaluate.reply(model, tokenizer, prompt) == wanted for prompt in prompts) / count


def main() -> None:
    """Trains once; prints the percentages before and after, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--count", type=int, default=60, help="held-out questions")
    parser.add_argument("--iters", type=int, default=25, help="training steps")
    options = parser.parse_args()
    base, tokenizer = load("demo")
    before = percent_preferred(base, tokenizer, options.count)
    with tempfile.TemporaryDirectory() as folder:
        adapter, minutes = train(
            Path(folder), pairs(), "--task", "dpo", "--beta", "0.02", "--iters", str(options.iters),
            "--batch-size", "16", "--max-seq-length", "256", "--learning-rate", "2e-4", "--warmup", "5",
            "--steps-per-report", "10",
        )  # fmt: skip
        model, _ = load("demo", adapter)
        after = percent_preferred(model, tokenizer, options.count)
        ids = mx.array([tokenizer.encode(questions(3, 1, held_out=True)[0])])
        with adapter_off(model):
            same = bool(mx.array_equal(model(ids), base(ids)))
    print(f"preferred refusals: {before:.0f} % -> {after:.0f} %")
    last_line(
        "preference",
        before_percent=before,
        after_percent=after,
        adapter_off_is_base=same,
        minutes=round(minutes, 2),
        prompts=options.count,
        ok=before < 20 and after > 80 and same,
    )


if __name__ == "__main__":
    main()

"""How often the demo finds a fact at the far end of its context, under the right RoPE table and under the wrong one.

    python tests/bench/retrieval.py [--pages 20]

Each prompt is a page of facts and a question about the first of them, at several lengths below and past the boundary.
An answer counts if it is right to the letter. Prints a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

import corpus
from draw import Draw

from phi4_mlx import load
from phi4_mlx.generation.steps import generate_step

LENGTHS = (128, 240, 300, 512, 1024, 2048, 3072)  # tokens of the prompt, at most; the boundary is at 256


def page(tokenizer: Any, draw: Draw, length: int) -> tuple[list[int], list[int]]:
    """A prompt as long as fits into `length` tokens, and its right answer."""
    facts = dict(corpus.new_fact(draw) for _ in range(length // 8))
    key, value = next(iter(facts.items()))
    lines = [f"{k.capitalize()} is {v}." for k, v in facts.items()]
    while True:
        text = " ".join(["Read this.", *lines, f"What is {key}?"])
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        if len(ids) <= length:
            return ids, tokenizer.encode(f"{key.capitalize()} is {value}.")
        lines.pop()


def found(model: Any, ids: list[int], answer: list[int], regime: str | None) -> bool:
    """Whether the greedy answer is right; `regime` names a RoPE table to use whatever the length."""
    drawn = generate_step(ids, model, max_tokens=len(answer), cache=model.make_cache(regime))
    return [token for token, _ in drawn] == answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pages", type=int, default=20, help="prompts of each length")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    boundary = model.config.original_max_position_embeddings
    rows = []
    for length in LENGTHS:
        draw = Draw(f"retrieval {length}", held_out=True)
        right, wrong = ("short", "long") if length <= boundary else ("long", "short")
        pages = [page(tokenizer, draw, length) for _ in range(options.pages)]
        counts = [sum(found(model, *prompt, regime) for prompt in pages) for regime in (None, wrong)]
        with_it, with_other = (100 * count / len(pages) for count in counts)
        rows.append({"tokens": length, "table": right, "percent": with_it, "other_table_percent": with_other})
    print("| prompt, tokens | table asked for | found with it | found with the other table |\n|---|---|---|---|")
    for row in rows:
        print("| {tokens} | {table} | {percent:.0f} % | {other_table_percent:.0f} % |".format(**row))
    print(json.dumps({"pages": options.pages, "boundary": boundary, "rows": rows}))


if __name__ == "__main__":
    main()

"""Retrieval of a fact from the start of the context, under the right RoPE table and under the other one, on the demo.

    python tests/bench/retrieval.py [--pages 20]

Each prompt is a page of facts and a question about the first one, at several lengths on both sides of the boundary. An
answer counts if it matches exactly. Prints a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import json

from demo_world import Draw, corpus
from harness import option_parser

from phi4_mlx import Tokenizer, load
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.rope import Regime
from phi4_mlx.models.text import Model

LENGTHS = (128, 240, 300, 512, 1024, 2048, 3072)  # longest prompt, in tokens; the boundary is at 256


def page(tokenizer: Tokenizer, draw: Draw, length: int) -> tuple[list[int], list[int]]:
    """The longest prompt of at most `length` tokens, and its right answer."""
    facts = dict(corpus.new_fact(draw) for _ in range(length // 8))
    key, value = next(iter(facts.items()))
    lines = [f"{k.capitalize()} is {v}." for k, v in facts.items()]
    while True:
        text = " ".join(["Read this.", *lines, f"What is {key}?"])
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        if len(ids) <= length:
            return ids, tokenizer.encode(f"{key.capitalize()} is {value}.")
        lines.pop()


def found(model: Model, ids: list[int], answer: list[int], regime: Regime | None) -> bool:
    """True if the greedy answer is right; `regime` forces a RoPE table at any length."""
    drawn = generate_step(ids, model, max_tokens=len(answer), cache=model.make_cache(regime))
    return [token for token, _ in drawn] == answer


def main() -> None:
    """Prints a row for each length, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pages", type=int, default=20, help="prompts of each length")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    boundary = model.config.original_max_position_embeddings
    rows: list[dict[str, object]] = []
    print("| prompt, tokens | right table | found with it | found with the other table |\n|---|---|---|---|")
    for length in LENGTHS:
        draw = Draw(f"retrieval {length}", held_out=True)
        right: Regime = "short" if length <= boundary else "long"
        wrong: Regime = "long" if right == "short" else "short"
        pages = [page(tokenizer, draw, length) for _ in range(options.pages)]
        counts = [sum(found(model, *prompt, regime) for prompt in pages) for regime in (None, wrong)]
        percent, other_percent = (100 * count / len(pages) for count in counts)
        rows.append({"tokens": length, "table": right, "percent": percent, "other_table_percent": other_percent})
        print(f"| {length} | {right} | {percent:.0f} % | {other_percent:.0f} % |", flush=True)
    print(json.dumps({"pages": options.pages, "boundary": boundary, "rows": rows}))


if __name__ == "__main__":
    main()

"""Forward passes a token, and time, with and without guesses: copying tasks and free text, on the demo.

    python tests/bench/speculation.py [--runs 5] [--tokens 300]

What the model answers is scripted: a logits processor lets it draw the next token of a text, at the full cost of its
own passes. So each task is answered as a good model would: a file with a few lines edited, a passage quoted, a tool's
result repeated, and text that has nothing of the prompt. `lookup` guesses wherever it may hold, `auto` where that pays
on this machine. The bars: copying at most 0.5 passes a token with `lookup`, free text at most 1.0, and `auto` never
more than 1.03 of the plain time. Paired, in turns, medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from phi4_mlx import load
from phi4_mlx.generation.speculate import PromptLookup
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.text import Model
from phi4_mlx.tokens.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
BARS = {"edit": 0.5, "quote": 0.5, "tool": 0.5, "free": 1.0}


def tasks(tokenizer: Tokenizer, length: int) -> Iterator[tuple[str, list[int], list[int]]]:
    """(name, prompt, answer) in token ids."""
    draw = random.Random(1)
    source = (ROOT / "phi4_mlx" / "schema.py").read_text()
    start = source.index("def ")
    file = source[start : start + 4 * length]
    lines = file.splitlines(keepends=True)
    for at in draw.sample(range(len(lines)), max(1, len(lines) // 12)):
        lines[at] = lines[at].replace("e", "", 1)
    readme = (ROOT / "README.md").read_text()
    people = [{"id": 7 * n, "name": f"item {n * n}", "price": draw.randint(100, 9999) / 100} for n in range(40)]
    result = json.dumps(people)
    middle = len(readme) // 2
    for name, prompt, answer in [
        ("edit", "Mend this file.\n" + file, "".join(lines)),
        ("quote", readme[:6000] + "\nWhat does it say there?", 'It says: "' + readme[2000:5000]),
        ("tool", result + "\nList what was found.", result[1:]),
        ("free", readme[:3000], readme[middle : middle + 6 * length]),
    ]:
        yield name, tokenizer.encode(prompt), tokenizer.encode(answer)[:length]


class Script:
    """Makes the model draw the tokens of an answer, whatever it would rather say."""

    def __init__(self, prompt: list[int], answer: list[int]):
        self.start, self.answer = len(prompt), answer

    def __call__(self, ids: mx.array, logits: mx.array) -> mx.array:
        at = min(ids.shape[0] - self.start, len(self.answer) - 1)
        return logits.at[:, self.answer[at]].add(1e4)


def run(model: Model, prompt: list[int], answer: list[int], proposer: PromptLookup | None) -> tuple[int, float]:
    """Passes after the first, and their seconds."""
    passes, head = 0, Model.logits

    def counted(hidden: mx.array) -> mx.array:
        nonlocal passes
        passes += 1
        return head(model, hidden)

    model.logits = counted  # type: ignore[method-assign]
    script = Script(prompt, answer)
    steps = generate_step(prompt, model, max_tokens=len(answer), logits_processors=[script], proposer=proposer)
    drawn = [next(steps)[0]]
    start = time.perf_counter()
    drawn += [token for token, _ in steps]
    seconds = time.perf_counter() - start
    del model.logits
    assert drawn == answer, "another text than the script's"
    return passes - 1, seconds


def main() -> None:
    """Prints a line a task, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=300)
    options = parser.parse_args()
    model, tokenizer = load("demo")
    passes, times, ok = {}, {}, True
    for name, prompt, answer in tasks(tokenizer, options.tokens):
        run(model, prompt, answer, None)
        count, _ = run(model, prompt, answer, PromptLookup(timed=False))
        ratios = []
        for _ in range(options.runs):
            plain = run(model, prompt, answer, None)[1]
            ratios.append(run(model, prompt, answer, PromptLookup())[1] / plain)
        passes[name], times[name] = round(count / (len(answer) - 1), 3), round(statistics.median(ratios), 3)
        print(f"{name:6} {passes[name]:.3f} passes a token, auto {times[name]:.3f} of the plain time")
        ok = ok and passes[name] <= BARS[name] and times[name] <= 1.03
    per_pass = {name: round(1 / each, 2) for name, each in passes.items()}
    result = {"passes_per_token": passes, "auto_time": times, "tokens_per_pass": per_pass, "ok": ok}
    print(json.dumps({"bench": "speculation"} | result))


if __name__ == "__main__":
    main()

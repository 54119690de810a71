"""Prompt lookup on the demo: forward passes per token and time, for copying tasks and free text.

    python tests/bench/speculation.py [--runs 5] [--tokens 300]

Answers are scripted: a logits processor forces the next token of a given text, and the model's passes cost what they
always cost. The tasks are a file with a few lines edited, a quoted passage, a repeated tool result, and text that
shares nothing with the prompt. `lookup` speculates wherever it can, `auto` where that pays on this machine. Bars with
`lookup`: at most 0.5 passes per token when copying, 1.0 in free text. Bar with `auto`: at most 1.03 of the plain time,
the median of pairs. The last line is JSON.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
from harness import ROOT, alternate, last_line, median_ratio, option_parser

from phi4_mlx import load
from phi4_mlx.generation.speculate import PromptLookup
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.text import Model
from phi4_mlx.tokens.tokenizer import Tokenizer

BARS = {"edit": 0.5, "quote": 0.5, "tool": 0.5, "free": 1.0}


def tasks(tokenizer: Tokenizer, length: int) -> Iterator[tuple[str, list[int], list[int]]]:
    """(name, prompt, answer) in token ids."""
    draw = random.Random(1)
    source = (ROOT / "phi4_mlx" / "grammar" / "schema.py").read_text()
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
    """A logits processor that forces the tokens of an answer."""

    def __init__(self, prompt: list[int], answer: list[int]):
        self.start, self.answer = len(prompt), answer

    def __call__(self, ids: mx.array, logits: mx.array) -> mx.array:
        at = min(ids.shape[0] - self.start, len(self.answer) - 1)
        return logits.at[:, self.answer[at]].add(1e4)


def run(
    model: Model, prompt: list[int], answer: list[int], make_proposer: Callable[[], PromptLookup] | None
) -> tuple[int, float]:
    """(forward passes after the first token, their seconds)."""
    passes, head = 0, Model.logits

    def counted(hidden: mx.array) -> mx.array:
        nonlocal passes
        passes += 1
        return head(model, hidden)

    model.logits = counted  # type: ignore[method-assign]
    script = Script(prompt, answer)
    proposer = make_proposer() if make_proposer else None
    steps = generate_step(prompt, model, max_tokens=len(answer), logits_processors=[script], proposer=proposer)
    drawn = [next(steps)[0]]
    start = time.perf_counter()
    drawn += [token for token, _ in steps]
    seconds = time.perf_counter() - start
    del model.logits
    assert drawn == answer, "the model drew other tokens than the script's"
    return passes - 1, seconds


def main() -> None:
    """Prints a line for each task, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=300, help="longest answer")
    options = parser.parse_args()
    model, tokenizer = load("demo")
    passes, times, ok = {}, {}, True
    for name, prompt, answer in tasks(tokenizer, options.tokens):
        run(model, prompt, answer, None)  # warm up
        count, _ = run(model, prompt, answer, partial(PromptLookup, timed=False))
        auto, plain = alternate(
            partial(run, model, prompt, answer, PromptLookup),
            partial(run, model, prompt, answer, None),
            options.runs,
        )
        passes[name] = round(count / (len(answer) - 1), 3)
        times[name] = round(median_ratio([took for _, took in auto], [took for _, took in plain]), 3)
        print(f"{name:6} {passes[name]:.3f} passes per token, auto {times[name]:.3f} of the plain time")
        ok = ok and passes[name] <= BARS[name] and times[name] <= 1.03
    per_pass = {name: round(1 / each, 2) for name, each in passes.items()}
    last_line("speculation", passes_per_token=passes, auto_time=times, tokens_per_pass=per_pass, ok=ok)


if __name__ == "__main__":
    main()

"""Continuous batching beside answers one by one: same tokens, and the ratio of the times.

    python tests/bench/batching.py

32 greedy answers on the demo, of mixed lengths, some across the RoPE boundary. Paired runs, median of three.
`row_ratio` is the limit of the machine: time per row of a forward pass with 32 rows, where a pass with one row is 1. It
is near 1 where a matrix product takes as long as its rows one by one, as on a CPU. Bar: `ratio` at most 0.5. The last
line is JSON.
"""

from __future__ import annotations

import random
from functools import partial
from statistics import median

import mlx.core as mx
from harness import alternate, last_line, median_ratio, option_parser, seconds, timed

from phi4_mlx.checkpoint import load
from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.sequence import BatchSequence, Fault
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.text import Model

REQUESTS, REPEATS = 32, 3
PROMPT, ANSWER = (10, 250), (64, 128)  # shortest and longest, in tokens

Request = tuple[list[int], int]  # prompt ids, tokens to draw


def requests(model: Model) -> list[Request]:
    """Random prompts with the lengths of their answers."""
    draw = random.Random(1)
    V = model.config.vocab_size - 50  # without the control tokens
    return [([draw.randrange(V) for _ in range(draw.randint(*PROMPT))], draw.randint(*ANSWER)) for _ in range(REQUESTS)]


def one_by_one(model: Model, asked: list[Request]) -> list[list[int]]:
    """The answers, each drawn alone."""
    return [[token for token, _ in generate_step(ids, model, max_tokens=limit)] for ids, limit in asked]


def together(model: Model, asked: list[Request]) -> list[list[int]]:
    """The answers, drawn in one batch."""
    batch = Batch(max_rows=REQUESTS)
    sequences = [BatchSequence(model, list(ids), limit) for ids, limit in asked]
    for sequence in sequences:
        batch.add(sequence)
    while batch.active or batch.waiting:
        for event in batch.step():
            assert not isinstance(event, Fault), event
            if event.sequence.drawn == event.sequence.max_tokens and event.sequence in batch.active:
                batch.end(event.sequence)
    return [sequence.ids[sequence.prompt_tokens :] for sequence in sequences]


def row_ratio(model: Model) -> float:
    """Time per row of a decode step with a full batch, divided by that with one row."""

    def per_row(rows: int) -> float:
        cache = model.make_cache("long")
        mx.eval(model(mx.zeros((rows, sum(PROMPT) // 2), mx.int32), cache))
        step = mx.zeros((rows, 1), mx.int32)
        return min(seconds(lambda: mx.eval(model(step, cache))) for _ in range(20)) / rows

    return per_row(REQUESTS) / per_row(1)


def main() -> None:
    """Prints a line for each pair, then JSON."""
    option_parser(__doc__).parse_args()
    model, _ = load("demo")
    asked = requests(model)
    boundary = model.config.original_max_position_embeddings
    crossing = sum(len(ids) <= boundary < len(ids) + limit for ids, limit in asked)
    one_by_one(model, asked[:2]), together(model, asked[:2])  # warm up
    pairs = alternate(partial(timed, together, model, asked), partial(timed, one_by_one, model, asked), REPEATS)
    same = all(batched == alone for (batched, _), (alone, _) in zip(*pairs, strict=True))
    together_s, alone_s = ([took for _, took in runs] for runs in pairs)
    for batched_s, one_s in zip(together_s, alone_s, strict=True):
        print(f"one by one {one_s:.2f} s, together {batched_s:.2f} s")
    print(f"same tokens: {same}")
    last_line(
        "batching",
        requests=REQUESTS,
        crossing=crossing,
        tokens=sum(limit for _, limit in asked),
        identical=same,
        one_by_one_s=round(median(alone_s), 2),
        together_s=round(median(together_s), 2),
        ratio=round(median_ratio(together_s, alone_s), 3),
        bar=0.5,
        row_ratio=round(row_ratio(model), 3),
    )


if __name__ == "__main__":
    main()

"""Continuous batching beside one answer after another: the same tokens, and the time that it takes.

    python tests/bench/batching.py

32 greedy answers on the demo, of mixed lengths, some across the RoPE boundary. Paired, in turns, median of three.
`row_ratio` is what the machine allows: the time of a forward pass for 32 rows, a row, beside that for one row. Where a
product of matrices takes as long as its rows one by one, as on a CPU, it is not far below 1. Last line: JSON.
"""

from __future__ import annotations

import json
import random
import statistics
import time

import mlx.core as mx

from phi4_mlx.checkpoint import load
from phi4_mlx.generation.batch import Batch, Fault, Sequence
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.text import Model

REQUESTS, REPEATS = 32, 3
PROMPT, ANSWER = (10, 250), (64, 128)  # tokens


def requests(model: Model) -> list[tuple[list[int], int]]:
    """Prompts and the lengths of their answers."""
    draw = random.Random(1)
    V = model.config.vocab_size - 50  # no control tokens
    return [([draw.randrange(V) for _ in range(draw.randint(*PROMPT))], draw.randint(*ANSWER)) for _ in range(REQUESTS)]


def one_by_one(model: Model, asked: list[tuple[list[int], int]]) -> list[list[int]]:
    """Each answered when the one before has ended."""
    return [[token for token, _ in generate_step(ids, model, max_tokens=limit)] for ids, limit in asked]


def together(model: Model, asked: list[tuple[list[int], int]]) -> list[list[int]]:
    """All at once."""
    batch = Batch(max_rows=REQUESTS)
    sequences = [Sequence(model, list(ids), limit) for ids, limit in asked]
    for sequence in sequences:
        batch.add(sequence)
    while batch.active or batch.waiting:
        for event in batch.step():
            assert not isinstance(event, Fault), event
            if event.sequence.drawn == event.sequence.max_tokens and event.sequence in batch.active:
                batch.end(event.sequence)
    return [sequence.ids[sequence.prompt_tokens :] for sequence in sequences]


def row_ratio(model: Model) -> float:
    """The time that a row of a full batch takes in a decode step, beside a row alone."""
    seconds = []
    for rows in (1, REQUESTS):
        cache = model.make_cache("long")
        mx.eval(model(mx.zeros((rows, sum(PROMPT) // 2), mx.int32), cache))
        times = []
        for _ in range(20):
            start = time.perf_counter()
            mx.eval(model(mx.zeros((rows, 1), mx.int32), cache))
            times.append(time.perf_counter() - start)
        seconds.append(min(times) / rows)
    return seconds[1] / seconds[0]


def main() -> None:
    """Prints a line a pair, then JSON."""
    model, _ = load("demo")
    asked = requests(model)
    boundary = model.config.original_max_position_embeddings
    crossing = sum(len(ids) <= boundary < len(ids) + limit for ids, limit in asked)
    one_by_one(model, asked[:2]), together(model, asked[:2])
    alone_s, together_s, same = [], [], True
    for _ in range(REPEATS):
        start = time.perf_counter()
        alone = one_by_one(model, asked)
        middle = time.perf_counter()
        same &= together(model, asked) == alone
        together_s.append(time.perf_counter() - middle)
        alone_s.append(middle - start)
        print(f"one by one {alone_s[-1]:.2f} s, together {together_s[-1]:.2f} s, same tokens: {same}")
    ratio = statistics.median(b / a for a, b in zip(alone_s, together_s, strict=True))
    result = {
        "bench": "batching",
        "requests": REQUESTS,
        "crossing": crossing,
        "tokens": sum(limit for _, limit in asked),
        "identical": same,
        "one_by_one_s": round(statistics.median(alone_s), 2),
        "together_s": round(statistics.median(together_s), 2),
        "ratio": round(ratio, 3),
        "bar": 0.5,
        "row_ratio": round(row_ratio(model), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""How many token slots the model runs for each token of the data, beside mlx-lm: the same samples, one epoch each.

    python tests/bench/padding.py

Lengths are drawn as chats have them: most short, a few at the limit. Last line: JSON.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator

import mlx.core as mx

from phi4_mlx.lora.data.batches import Batches
from phi4_mlx.lora.data.samples import Sample

SAMPLES, LIMIT, BATCH_SIZE = 4000, 2048, 4
MEDIAN, SIGMA = 150, 1.0  # of the log-normal distribution, in tokens and in nats


def lengths() -> list[int]:
    """Tokens of each sample."""
    draw = random.Random(1)
    return [min(LIMIT, max(2, round(MEDIAN * draw.lognormvariate(0, SIGMA)))) for _ in range(SAMPLES)]


def ratio(inputs: Iterable[mx.array], tokens: int) -> tuple[float, float]:
    """Slots for each token of the data, and the seconds that it took to make the batches."""
    start = time.perf_counter()
    slots = sum(batch.size for batch in inputs)
    return round(slots / tokens, 4), round(time.perf_counter() - start, 2)


def of_mlx_lm(data: list[list[int]]) -> Iterator[mx.array]:
    """The inputs as its training loop makes them, all of them."""
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    class Processed(list[tuple[list[int], int]]):
        def process(self, item: tuple[list[int], int]) -> tuple[list[int], int]:
            return item

    dataset = CacheDataset(Processed((ids, 0) for ids in data))
    for batch, _ in iterate_batches(dataset, BATCH_SIZE, LIMIT, seed=0):
        yield batch[:, :-1]


def main() -> None:
    """Prints a line a way, then JSON."""
    data = [[1] * length for length in lengths()]
    samples = [Sample(ids, [False] + [True] * (len(ids) - 1), "train.jsonl:1") for ids in data]
    tokens = sum(len(ids) - 1 for ids in data)
    packed, by_length = (
        Batches(samples, batch_size=BATCH_SIZE, max_seq_length=LIMIT, packing=packing) for packing in (True, False)
    )
    result: dict[str, object] = {"bench": "padding", "samples": SAMPLES, "tokens": tokens}
    for name, inputs in {
        "mlx_lm": of_mlx_lm(data),
        "packed": (batch.inputs for batch in packed.fixed()),
        "by_length": (batch.inputs for batch in by_length.fixed()),
    }.items():
        result[name], seconds = ratio(inputs, tokens)
        print(f"{name}: {result[name]} slots a token, batches made in {seconds} s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

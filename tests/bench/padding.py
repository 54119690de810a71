"""Padding: token slots that the model runs per token of the data, beside mlx-lm, over one epoch of the same samples.

    python tests/bench/padding.py

Lengths are distributed as in chats: most are short, a few reach the limit. The last line is JSON.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import mlx.core as mx
from harness import last_line, option_parser, timed

from phi4_mlx.data.samples import Sample
from phi4_mlx.lora.training.batches import Batches

SAMPLES, LIMIT, BATCH_SIZE = 4000, 2048, 4
MEDIAN, SIGMA = 150, 1.0  # of the log-normal distribution, in tokens and in nats


def lengths() -> list[int]:
    """Tokens of each sample."""
    draw = random.Random(1)
    return [min(LIMIT, max(2, round(MEDIAN * draw.lognormvariate(0, SIGMA)))) for _ in range(SAMPLES)]


def ratio(inputs: Iterable[mx.array], tokens: int) -> tuple[float, float]:
    """(slots per token of the data, seconds to make the batches)."""
    slots, took = timed(lambda: sum(batch.size for batch in inputs))
    return round(slots / tokens, 4), round(took, 2)


def inputs_of_mlx_lm(data: list[list[int]]) -> Iterator[mx.array]:
    """One epoch of inputs, as mlx-lm's training loop makes them."""
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    class Processed(list[tuple[list[int], int]]):
        def process(self, item: tuple[list[int], int]) -> tuple[list[int], int]:
            return item

    dataset = CacheDataset(Processed((ids, 0) for ids in data))
    for batch, _ in iterate_batches(dataset, BATCH_SIZE, LIMIT, seed=0):
        yield batch[:, :-1]


def main() -> None:
    """Prints a line for each way to make batches, then JSON."""
    option_parser(__doc__).parse_args()
    data = [[1] * length for length in lengths()]
    samples = [Sample(ids, [False] + [True] * (len(ids) - 1), "train.jsonl:1") for ids in data]
    tokens = sum(len(ids) - 1 for ids in data)
    packed, by_length = (
        Batches(samples, batch_size=BATCH_SIZE, max_seq_length=LIMIT, packing=packing) for packing in (True, False)
    )
    ratios: dict[str, float] = {}
    for name, inputs in {
        "mlx_lm": inputs_of_mlx_lm(data),
        "packed": (batch.inputs for batch in packed.fixed()),
        "by_length": (batch.inputs for batch in by_length.fixed()),
    }.items():
        ratios[name], seconds = ratio(inputs, tokens)
        print(f"{name}: {ratios[name]} slots per token, batches made in {seconds} s")
    last_line("padding", samples=SAMPLES, tokens=tokens, **ratios)


if __name__ == "__main__":
    main()

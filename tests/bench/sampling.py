"""Time of one draw at the true vocabulary, beside mlx-lm's, on the same log-probabilities.

    python tests/bench/sampling.py [--runs 30]

The bar: temperature 0.8 with top-p 0.95 takes at most 0.4 of its time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler as make_theirs

from phi4_mlx import make_sampler

V = 200_064
SETTINGS: dict[str, dict[str, Any]] = {
    "temp": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_p 0.8": {"top_p": 0.8},
    "top_p 0.5": {"top_p": 0.5},
    "top_k 40": {"top_k": 40},
    "top_p 0.95, min_p 0.05": {"top_p": 0.95, "min_p": 0.05},
}


def seconds(sampler: Callable[[mx.array], mx.array], logprobs: mx.array) -> float:
    start = time.perf_counter()
    mx.eval(sampler(logprobs))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    options = parser.parse_args()
    logits = 3 * mx.random.normal((1, V), key=mx.random.key(1))
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(logprobs)
    ratios = {}
    for name, setting in SETTINGS.items():
        ours, theirs = make_sampler(0.8, **setting), make_theirs(0.8, **setting)
        pairs = [(seconds(ours, logprobs), seconds(theirs, logprobs)) for _ in range(options.runs + 1)][1:]
        ratios[name] = round(statistics.median(a / b for a, b in pairs), 3)
        print(f"{name:24} {ratios[name]:.3f} of mlx-lm's time")
    print(json.dumps({"bench": "sampling", "ratios": ratios, "ok": ratios["top_p 0.95"] <= 0.4}))


if __name__ == "__main__":
    main()

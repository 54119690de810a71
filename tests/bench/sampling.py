"""Time to draw one token at V = 200,064, beside mlx-lm on the same log-probabilities.

    python tests/bench/sampling.py [--runs 30]

Bar: at most 0.4 of mlx-lm's time at temperature 0.8 with top-p 0.95. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from harness import alternate, last_line, median_ratio, option_parser, seconds
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


def draw(sampler: Callable[[mx.array], mx.array], logprobs: mx.array) -> None:
    """Draws and evaluates one token."""
    mx.eval(sampler(logprobs))


def main() -> None:
    """Prints a line for each sampler, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--runs", type=int, default=30)
    runs = parser.parse_args().runs
    logits = 3 * mx.random.normal((1, V), key=mx.random.key(1))
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(logprobs)
    ratios = {}
    for name, setting in SETTINGS.items():
        ours, theirs = make_sampler(0.8, **setting), make_theirs(0.8, **setting)
        mine, other = alternate(
            partial(seconds, draw, ours, logprobs), partial(seconds, draw, theirs, logprobs), runs + 1
        )
        ratios[name] = round(median_ratio(mine[1:], other[1:]), 3)  # the first pair warms up
        print(f"{name:24} {ratios[name]:.3f} of mlx-lm's time")
    last_line("sampling", ratios=ratios, ok=ratios["top_p 0.95"] <= 0.4)


if __name__ == "__main__":
    main()

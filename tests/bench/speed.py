"""Tokens per second in prefill and decode, beside mlx-lm: same arrays and prompts, each through its own loop.

    python tests/bench/speed.py [--runs 5] [--only demo]

Models: the demo; Phi-4-mini's true shapes with one layer (`true`); an eighth of that width with 32 layers, for decode
(`deep`), and with 2, for prefill (`thin`); all in 4 bits. Decode is timed from the first token to the last, prefill
from the call to the first token. Figures are medians of the ratios of pairs. Bars: decode at least 1.0 of mlx-lm's
tokens per second on the demo and at the true shapes, greedy and sampled, and 0.97 in any setting; prefill of 2,048
tokens at least 1.0. The last line is JSON.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
from harness import alternate, last_line, median_ratio, option_parser
from mlx_lm.generate import generate_step as their_generate_step
from mlx_lm.generate import generation_stream
from mlx_lm.models import phi3
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler as make_their_sampler
from peer import config_of, demo_pair, random_pair

from phi4_mlx import generate_step, make_sampler
from phi4_mlx.models.text import Model

SAMPLED: dict[str, Any] = {"temp": 0.8, "top_p": 0.95}
MODELS: dict[str, Callable[[], tuple[Model, phi3.Model]]] = {
    "demo": demo_pair,
    "true": lambda: random_pair(config_of(1)),
    "deep": lambda: random_pair(config_of(32, kv_heads=1, vocab_size=512)),
    "thin": lambda: random_pair(config_of(2, kv_heads=1, vocab_size=512)),
}


@dataclass(frozen=True)
class Setting:
    """One measured case.

    Attributes:
        model: a key of `MODELS`.
        name: printed after the model's.
        prompt: tokens of the prompt.
        new: tokens to draw; 1 measures prefill, more measure decode.
        sampling: options of the sampler; None is greedy.
        kv_bits: bits of a quantised cache.
        bar: least ratio to mlx-lm's tokens per second.
    """

    model: str
    name: str
    prompt: int
    new: int
    sampling: dict[str, Any] | None = None
    kv_bits: int | None = None
    bar: float = 0.97

    @property
    def label(self) -> str:
        return f"{self.model} {self.name}"


SETTINGS = [
    Setting("demo", "decode greedy", 32, 192, bar=1.0),
    Setting("demo", "decode sampled", 32, 192, SAMPLED, bar=1.0),
    Setting("demo", "decode at 1,024", 1024, 64),
    Setting("demo", "decode kv 8 bits", 32, 192, kv_bits=8),
    Setting("demo", "decode kv 4 bits", 32, 192, kv_bits=4),
    Setting("demo", "prefill 2,048", 2048, 1, bar=1.0),
    Setting("true", "decode greedy", 4, 8, bar=1.0),
    Setting("true", "decode sampled", 4, 8, SAMPLED, bar=1.0),
    Setting("deep", "decode greedy", 8, 32),
    Setting("thin", "prefill 2,048", 2048, 1, bar=1.0),
]


def prompt_of(setting: Setting, vocab_size: int) -> list[int]:
    """Random ids, the same for both."""
    draw = random.Random(setting.prompt)
    return [draw.randrange(vocab_size) for _ in range(setting.prompt)]


def tokens_per_s(setting: Setting, start: float, steps: Iterable[Any]) -> float:
    """Runs the steps of a loop called at `start`."""
    times = [time.perf_counter() for _ in steps]
    assert len(times) == setting.new
    mx.synchronize(generation_stream)  # mlx-lm queues one step more than it was asked for
    if setting.new == 1:
        return setting.prompt / (times[0] - start)
    return (setting.new - 1) / (times[-1] - times[0])


def ours(setting: Setting, model: Model) -> float:
    """Tokens per second of our loop."""
    prompt = prompt_of(setting, model.config.vocab_size)
    sampler = make_sampler(**setting.sampling) if setting.sampling else None
    cache = model.make_cache(kv_bits=setting.kv_bits)
    start = time.perf_counter()
    return tokens_per_s(
        setting, start, generate_step(prompt, model, max_tokens=setting.new, sampler=sampler, cache=cache)
    )


def theirs(setting: Setting, model: phi3.Model) -> float:
    """Tokens per second of mlx-lm's loop."""
    prompt = mx.array(prompt_of(setting, model.args.vocab_size))
    sampler = make_their_sampler(**setting.sampling) if setting.sampling else None
    cache = make_prompt_cache(model)
    start = time.perf_counter()
    return tokens_per_s(
        setting,
        start,
        their_generate_step(
            prompt, model, max_tokens=setting.new, sampler=sampler, prompt_cache=cache, kv_bits=setting.kv_bits,
            quantized_kv_start=0,
        ),
    )  # fmt: skip


def results(only: set[str], runs: int) -> Iterator[tuple[Setting, list[float], list[float]]]:
    """(setting, our tokens per second in each pair, mlx-lm's)."""
    for name, make in MODELS.items():
        if name not in only:
            continue
        model, other = make()
        for setting in (each for each in SETTINGS if each.model == name):
            mine, peers = partial(ours, setting, model), partial(theirs, setting, other)
            mine(), peers()  # warm up
            yield setting, *alternate(mine, peers, runs)


def main() -> None:
    """Prints a line for each setting, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()

    figures: dict[str, Any] = {}
    for setting, mine, other in results(set(options.only), options.runs):
        ratio = median_ratio(mine, other)
        figures[setting.label] = {
            "tokens_per_s": round(median(mine), 2),
            "mlx_lm_tokens_per_s": round(median(other), 2),
            "ratio": round(ratio, 4),
            "bar": setting.bar,
            "ok": ratio >= setting.bar,
        }
        print(
            f"{setting.label:24} ours {median(mine):9,.2f} tokens/s, mlx-lm {median(other):9,.2f}, ratio {ratio:.3f} "
            f"(bar {setting.bar})",
            flush=True,
        )
    last_line("speed", runs=options.runs, settings=figures, ok=all(each["ok"] for each in figures.values()))


if __name__ == "__main__":
    main()

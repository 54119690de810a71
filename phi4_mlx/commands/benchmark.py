"""`python -m phi4_mlx benchmark`: the speed of a model on this machine, and its share of the memory's ceiling.

A decode step reads all weights, and the cached keys, values and states of each layer, so bandwidth divided by those
bytes is the ceiling of decode.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, TypedDict

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.amount import amount, size
from phi4_mlx.terminal.command import Idle, Parser, number, run, typed
from phi4_mlx.terminal.options import add_kv_bits_option, add_model_options, load_options

if TYPE_CHECKING:
    from phi4_mlx.models.model import LanguageModel

BANDWIDTHS = {
    "Apple M1": 68.25, "Apple M1 Pro": 200, "Apple M1 Max": 400, "Apple M1 Ultra": 800,
    "Apple M2": 100, "Apple M2 Pro": 200, "Apple M2 Max": 400, "Apple M2 Ultra": 800,
    "Apple M3": 100, "Apple M3 Pro": 150, "Apple M3 Max": 400, "Apple M3 Ultra": 819,
    "Apple M4": 120, "Apple M4 Pro": 273, "Apple M4 Max": 546,
    "Apple M5": 153, "Apple M5 Pro": 307, "Apple M5 Max": 614,
}  # fmt: skip
"""Memory bandwidth in GB/s, by the chip's name. The M3, M4 and M5 Max with fewer cores have 300, 410 and 460 GB/s.

Source: Apple's technical specifications.
"""


class LengthReport(TypedDict):
    """The medians for one prompt length."""

    prompt_tokens: int
    prefill_tokens_per_s: float
    time_to_first_token_s: float
    decode_tokens_per_s: float
    kv_bytes_per_token: int
    fixed_bytes: int
    ceiling_tokens_per_s: float | None
    share_of_ceiling: float | None
    peak_bytes: int


class Report(TypedDict):
    """The JSON of `--json`."""

    model: str
    device: str
    mlx: str
    bandwidth_gb_per_s: float | None
    weights_bytes: int
    kv_bits: int | None
    generation_tokens: int
    repeats: int
    lengths: list[LengthReport]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _benchmark, argv)


def _parser() -> Parser:
    parser = Parser(
        prog=typed("benchmark"),
        description="Measure the speed and memory of a model: medians of several greedy runs on random prompts.",
    )
    add_model_options(parser)
    count = number(int, 1, 10_000_000)
    parser.add_argument(
        "--prompt-tokens", type=count, nargs="+", default=[512, 2048], metavar="N",
        help="lengths of the prompts",
    )  # fmt: skip
    parser.add_argument(
        "--generation-tokens", type=number(int, 2, 10_000_000), default=128, metavar="N",
        help="tokens drawn after each prompt",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=number(int, 1, 1000), default=3, metavar="N",
        help="runs for each length",
    )  # fmt: skip
    add_kv_bits_option(parser)
    parser.add_argument(
        "--bandwidth", type=number(float, 0.001, 1e6), metavar="GB/S",
        help="memory bandwidth, for the share of the ceiling (default: the chip's, if it is known)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    parser.idle.append(Idle(("chat_format",), lambda args: True, "here: the prompts are random tokens"))
    return parser


def _benchmark(args: argparse.Namespace) -> None:
    import mlx.core as mx

    from phi4_mlx.checkpoint import load
    from phi4_mlx.hub import DEFAULT_MODEL

    name = args.model or DEFAULT_MODEL
    model, _ = load(name, **load_options(args))
    longest, context = max(args.prompt_tokens) + args.generation_tokens, model.config.max_position_embeddings
    if longest > context:
        raise RequestError(
            f"--prompt-tokens {max(args.prompt_tokens)} and --generation-tokens {args.generation_tokens} come to "
            f"{longest}, and the context holds {context}{model.config.context_note}; lower one"
        )
    device = str(mx.device_info().get("device_name", "unknown"))
    bandwidth = BANDWIDTHS.get(device) if args.bandwidth is None else args.bandwidth
    report: Report = {
        "model": name,
        "device": device,
        "mlx": mx.__version__,
        "bandwidth_gb_per_s": bandwidth,
        "weights_bytes": model.weights_bytes,
        "kv_bits": args.kv_bits,
        "generation_tokens": args.generation_tokens,
        "repeats": args.repeats,
        "lengths": [_length(model, length, args, bandwidth) for length in args.prompt_tokens],
    }
    print(json.dumps(report) if args.json else table(report))


def _length(model: LanguageModel, length: int, args: argparse.Namespace, bandwidth: float | None) -> LengthReport:
    """The figures for one prompt length."""
    import mlx.core as mx

    measure(model, length, 2, args.kv_bits)  # compiles kernels, and reads weights that are still on disk
    mx.reset_peak_memory()
    runs = []
    for each in range(1, args.repeats + 1):
        first_s, decode_s, cached_bytes = measure(model, length, args.generation_tokens, args.kv_bits)
        runs.append((first_s, decode_s))
        line = f"{amount(length, 'token')}, run {each} of {args.repeats}: first token after {first_s:.2f} s"
        print(f"{line}, the others in {decode_s:.2f} s", file=sys.stderr, flush=True)
    first_s, decode_s = (median(times) for times in zip(*runs, strict=True))
    decode = (args.generation_tokens - 1) / decode_s
    cost, cached = model.context_cost(args.kv_bits), length + args.generation_tokens - 1
    fixed_bytes = round((cached_bytes - cost.token_bytes) * cached)
    kv_bytes = cost.reads * cost.token_bytes * (length + args.generation_tokens // 2)
    ceiling = ceiling_tokens_per_s(model.step_bytes + fixed_bytes + kv_bytes, bandwidth)
    return {
        "prompt_tokens": length,
        "prefill_tokens_per_s": length / first_s,
        "time_to_first_token_s": first_s,
        "decode_tokens_per_s": decode,
        "kv_bytes_per_token": cost.token_bytes,
        "fixed_bytes": fixed_bytes,
        "ceiling_tokens_per_s": ceiling,
        "share_of_ceiling": None if ceiling is None else decode / ceiling,
        "peak_bytes": mx.get_peak_memory(),
    }


def measure(
    model: LanguageModel, length: int, new_tokens: int, kv_bits: int | None = None
) -> tuple[float, float, float]:
    """Times one random prompt and its answer, both under the RoPE table that the whole needs.

    Args:
        model: from `load`.
        length: of the prompt, in tokens.
        new_tokens: tokens to draw, at least 2.
        kv_bits: 4 or 8 for quantised keys and values; None for none.

    Returns:
        (seconds to the first token, seconds from the first to the last, cached bytes per token)
    """
    import random

    import mlx.core as mx

    from phi4_mlx.generation.steps import generate_step
    from phi4_mlx.generation.stream import wired_memory

    draw = random.Random(length)
    prompt = [draw.randrange(model.config.vocab_size) for _ in range(length)]
    cache = model.make_cache(model.regime(length + new_tokens), kv_bits)
    mx.clear_cache()
    with wired_memory():
        start = time.perf_counter()
        times = [time.perf_counter() for _ in generate_step(prompt, model, max_tokens=new_tokens, cache=cache)]
    cached_bytes = sum(part.nbytes for layer in cache for part in layer.state) / cache.offset
    return times[0] - start, times[-1] - times[0], cached_bytes


def ceiling_tokens_per_s(bytes_per_token: float, bandwidth_gb_per_s: float | None) -> float | None:
    """The tokens per second that the memory bandwidth allows; None if it is not known."""
    return None if bandwidth_gb_per_s is None else 1e9 * bandwidth_gb_per_s / bytes_per_token


def table(report: Report) -> str:
    """The report as a table for people."""
    bandwidth = report["bandwidth_gb_per_s"]
    known = "bandwidth not known: --bandwidth" if bandwidth is None else f"{bandwidth:g} GB/s"
    kv_bytes, fixed_bytes = report["lengths"][0]["kv_bytes_per_token"], report["lengths"][-1].get("fixed_bytes", 0)
    states = f", {size(fixed_bytes)} of states and windows" if fixed_bytes else ""
    lines = [
        f"{report['model']} on {report['device']} ({known}), mlx {report['mlx']}",
        f"{size(report['weights_bytes'])} of weights, {size(kv_bytes)} of keys and values a token{states}",
        "",
        f"{'prompt':>9} {'prefill':>11} {'first token':>12} {'decode':>11} {'of ceiling':>11} {'peak':>9}",
        f"{'tokens':>9} {'tokens/s':>11} {'s':>12} {'tokens/s':>11} {'%':>11} {'':>9}",
    ]
    for row in report["lengths"]:
        share = "-" if row["share_of_ceiling"] is None else f"{100 * row['share_of_ceiling']:.1f}"
        lines.append(
            f"{row['prompt_tokens']:9,} {row['prefill_tokens_per_s']:11,.1f} {row['time_to_first_token_s']:12.3f} "
            f"{row['decode_tokens_per_s']:11,.1f} {share:>11} {size(row['peak_bytes']):>9}"
        )
    return "\n".join(lines)

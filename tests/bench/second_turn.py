"""Time to the first token of a second turn whose history comes from a file, beside a prefill of the whole.

    python tests/bench/second_turn.py [--layers 1] [--kv-heads 1] [--runs 3]

A block of Phi-4-mini in 4 bits, three queries a key head of 128 numbers, with as many heads as a CPU can prefill for; 8
is the true width. The work of a prefill grows with the square of the width, the file with the width alone. The warm
time has everything in it: hashing the model, reading and checking the file, the new tokens. `long` is a history of
4,096 tokens under the long RoPE table, `short` one that comes to 4,096 with the new tokens.

The bar: the new tokens alone are prefilled, in at most 0.05 of the time. Paired, medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from peer import config_of, last_line, random_pair

from phi4_mlx import load, load_prompt_cache, save_prompt_cache
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.rope import Regime
from phi4_mlx.models.text import Model
from phi4_mlx.tokens.tokenizer import Tokenizer

TOKENS, NEW, V = 4096, 24, 2048
LIMIT = 0.05


def first_token(model: Model, ids: list[int], cache: PromptCache) -> tuple[int, int]:
    """(token, tokens that were prefilled for it)."""
    ran = [0]
    steps = generate_step(
        ids, model, max_tokens=1, cache=cache, prompt_progress_callback=lambda _, total: ran.append(total)
    )
    token, _ = next(iter(steps))
    return token, max(ran)


def compare(
    model: Model, tokenizer: Tokenizer, file: Path, history: int, regime: Regime | None, runs: int
) -> tuple[int, float]:
    """(tokens prefilled in the second turn, its time in that of a cold one)."""
    ids = mx.random.randint(0, V, (history + NEW,), key=mx.random.key(2)).tolist()
    first = model.make_cache(regime)
    first_token(model, ids[:history], first)
    size = save_prompt_cache(file, first, model, tokenizer)
    ratios = []
    for _ in range(runs):
        start = time.perf_counter()
        cold, _ = first_token(model, ids, model.make_cache(regime))
        cold_s = time.perf_counter() - start
        start = time.perf_counter()
        cache = load_prompt_cache(file, model, tokenizer)
        read_s = time.perf_counter() - start
        warm, prefilled = first_token(model, cache.reuse(ids), cache)
        warm_s = time.perf_counter() - start
        assert warm == cold, "the second turn begins with another token"
        ratios.append(warm_s / cold_s)
        print(
            f"{history} + {NEW} tokens: cold {cold_s:.2f} s; warm {warm_s:.3f} s, of it {read_s:.3f} s to read "
            f"{size / 1e6:.0f} MB; {prefilled} prefilled",
            flush=True,
        )
    return prefilled, round(statistics.median(ratios), 4)


def main() -> None:
    """Prints a line a turn, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    model, _ = random_pair(config_of(options.layers, options.kv_heads, V))
    _, tokenizer = load("demo")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "history.cache"
        results = {
            "long": compare(model, tokenizer, file, TOKENS, "long", options.runs),
            "short": compare(model, tokenizer, file, TOKENS - NEW, None, options.runs),
        }
    prefilled = {name: count for name, (count, _) in results.items()}
    ratios = {name: ratio for name, (_, ratio) in results.items()}
    ok = all(count == NEW for count in prefilled.values()) and max(ratios.values()) <= LIMIT
    last_line("second_turn", ok, new=NEW, prefilled=prefilled, ratios=ratios)


if __name__ == "__main__":
    main()

"""Time to the first token of a second turn with the history from a prompt cache file, beside prefilling all of it.

    python tests/bench/second_turn.py [--layers 1] [--kv-heads 1] [--runs 3]

The model is one layer of Phi-4-mini in 4 bits with fewer heads, so that a CPU can prefill it; 8 key heads are the true
width. Work of a prefill grows with the square of the width, the file with the width. The warm time counts everything:
hashing the model, reading and checking the file, prefilling the new tokens. `long` is a history of 4,096 tokens under
the long RoPE table; `short` is a history that reaches 4,096 with the new tokens.

Bar: only the new tokens are prefilled, in at most 0.05 of the cold time (median of pairs). The last line is JSON.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

import mlx.core as mx
from harness import last_line, option_parser, timed
from peer import config_of, random_pair

from phi4_mlx import load, load_prompt_cache, save_prompt_cache
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.rope import Regime
from phi4_mlx.models.text import Model
from phi4_mlx.tokens.tokenizer import Tokenizer

TOKENS, NEW, V = 4096, 24, 2048
BAR = 0.05


def first_token(model: Model, ids: list[int], cache: PromptCache) -> tuple[int, int]:
    """(first token, tokens prefilled for it)."""
    prefilled = [0]
    steps = generate_step(
        ids, model, max_tokens=1, cache=cache, prompt_progress_callback=lambda _, total: prefilled.append(total)
    )
    token, _ = next(iter(steps))
    return token, max(prefilled)


def resumed(file: Path, model: Model, tokenizer: Tokenizer, ids: list[int]) -> tuple[int, int, float]:
    """(first token, tokens prefilled for it, seconds to read the file) with the history from a file."""
    cache, read_s = timed(load_prompt_cache, file, model, tokenizer)
    return *first_token(model, cache.reuse(ids), cache), read_s


def compare(
    model: Model, tokenizer: Tokenizer, file: Path, history: int, regime: Regime | None, runs: int
) -> tuple[int, float]:
    """(tokens prefilled in the second turn, warm time divided by cold time)."""
    ids = mx.random.randint(0, V, (history + NEW,), key=mx.random.key(2)).tolist()
    first = model.make_cache(regime)
    first_token(model, ids[:history], first)
    size = save_prompt_cache(file, first, model, tokenizer)
    ratios = []
    for _ in range(runs):
        (cold, _), cold_s = timed(first_token, model, ids, model.make_cache(regime))
        (warm, prefilled, read_s), warm_s = timed(resumed, file, model, tokenizer, ids)
        assert warm == cold, "the second turn starts with another token"
        ratios.append(warm_s / cold_s)
        print(
            f"{history} + {NEW} tokens: cold {cold_s:.2f} s; warm {warm_s:.3f} s, of which {read_s:.3f} s to read "
            f"{size / 1e6:.0f} MB; {prefilled} prefilled",
            flush=True,
        )
    return prefilled, round(median(ratios), 4)


def main() -> None:
    """Prints a line for each turn, then JSON."""
    parser = option_parser(__doc__)
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
    ok = all(count == NEW for count in prefilled.values()) and max(ratios.values()) <= BAR
    last_line("second_turn", new=NEW, prefilled=prefilled, ratios=ratios, ok=ok)


if __name__ == "__main__":
    main()

"""Memory and error of attention over a 4-bit cache, beside mlx-lm's quantised path, from 4,096 to 131,072 tokens.

    python tests/bench/long_context.py [--new-tokens 128] [--dtype float32]

One layer of Phi-4-mini, 24 query and 8 key heads of 128: the last 128 tokens, or T, go into a cache that already holds
the others, and attend to all. Both get the same random arrays, in groups of 64. `above` is the peak over what was
active before; `whole` counts the cache too. Errors are against dense float64 attention over the cache, dequantised,
relative to its largest number. Beyond 32,768 mlx-lm's peak is a line through its last two figures: its scores grow with
the context. The bars: at 32,768 both are at most a tenth of mlx-lm's, and the error within 1e-5. Last line: JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import quantized_scaled_dot_product_attention
from mlx_lm.models.cache import QuantizedKVCache
from peer import HEAD_DIM, last_line

from phi4_mlx.models.attention import attention
from phi4_mlx.models.cache import KVCache

H, K = 24, 8  # query heads, key heads
BITS, GROUP = 4, 64
QUERIES = 1_000_000  # a seed
SCALE = HEAD_DIM**-0.5
BAR_CONTEXT, BAR = 32_768, 0.1
CONTEXTS = (4_096, 8_192, 16_384, 32_768, 65_536, 131_072)
MOST_THEIRS = 32_768  # tokens; beyond, mlx-lm's peak is computed
PEAKS = ("above", "whole")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}

Attend = Callable[[Any, mx.array, mx.array, mx.array], mx.array]


def ours(cache: Any, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Appends keys and values, and attends with the queries."""
    held = cache.update_and_fetch(keys, values)
    return attention(queries, *held, SCALE, "causal", BITS)


def theirs(cache: Any, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """The same with mlx-lm's functions; it scales the queries where they stand, so they are copied."""
    held = cache.update_and_fetch(keys, values)
    return quantized_scaled_dot_product_attention(queries + 0, *held, SCALE, "causal", GROUP, BITS)


def drawn(heads: int, length: int, seed: int, dtype: mx.Dtype) -> mx.array:
    """Random heads [1, heads, length, Dh]."""
    return mx.random.normal((1, heads, length, HEAD_DIM), dtype, key=mx.random.key(seed))


def measure(attend: Attend, cache: Any, S: int, T: int, dtype: mx.Dtype) -> tuple[dict[str, Any], mx.array]:
    """Peaks in bytes, above what was active before and whole, and seconds of T tokens at length S; what they saw."""
    for start in range(0, S - T, 4096):
        length = min(4096, S - T - start)
        held = cache.update_and_fetch(drawn(K, length, 2 * start, dtype), drawn(K, length, 2 * start + 1, dtype))
        mx.eval(held)
    del held
    new = (drawn(H, T, QUERIES, dtype), drawn(K, T, QUERIES + 1, dtype), drawn(K, T, QUERIES + 2, dtype))
    mx.eval(new)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    seen = attend(cache, *new)
    mx.eval(seen)
    peak, seconds = mx.get_peak_memory(), time.perf_counter() - start
    return {"above": peak - before, "whole": peak, "seconds": round(seconds, 3)}, seen


def dense(cache: KVCache, T: int) -> np.ndarray:
    """What T queries should have seen, [H, T, Dh] in float64, from the keys and values that the cache holds."""
    state = cache.state
    keys, values = (
        np.array(mx.dequantize(*parts, GROUP, BITS)[0].astype(mx.float32)) for parts in (state[:3], state[3:])
    )  # [K, S, Dh]
    queries = np.array(drawn(H, T, QUERIES, state[1].dtype)[0].astype(mx.float32), np.float64)
    S = keys.shape[1]
    hidden = np.arange(S - T, S)[:, None] < np.arange(S)
    out = []
    for head, rows in enumerate(queries):
        scores = SCALE * rows @ keys[head // (H // K)].T
        scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out.append(weights @ values[head // (H // K)] / weights.sum(axis=-1, keepdims=True))
    return np.stack(out)


def error(seen: mx.array, right: np.ndarray) -> float:
    """The largest difference, relative to the largest number."""
    return float(np.abs(np.array(seen[0].astype(mx.float32)) - right).max() / np.abs(right).max())


def figures(S: int, T: int, dtype: mx.Dtype, before: list[dict[str, Any]]) -> dict[str, Any]:
    """Both at one length; `before` has those of shorter ones."""
    cache = KVCache(BITS)
    mine, seen = measure(ours, cache, S, T, dtype)
    right = dense(cache, T)
    row = {"context": S, "cache": cache.nbytes, **mine, "error": error(seen, right)}
    del cache, seen
    if S <= MOST_THEIRS:
        other, seen = measure(theirs, QuantizedKVCache(GROUP, BITS), S, T, dtype)
        other["error"] = error(seen, right)
    else:
        a, b = before[-2:]
        steps = (S - b["context"]) / (b["context"] - a["context"])
        lines = {each: (a[f"mlx_lm_{each}"], b[f"mlx_lm_{each}"]) for each in PEAKS}
        other = {each: round(high + steps * (high - low)) for each, (low, high) in lines.items()}
    return row | {f"mlx_lm_{name}": value for name, value in other.items()} | {"computed": S > MOST_THEIRS}


def show(row: dict[str, Any]) -> None:
    """A line of figures."""
    both = []
    for name, prefix in (("ours", ""), ("mlx-lm", "mlx_lm_")):
        peaks = "{:.1f} MB above, {:.1f} whole".format(*(row[prefix + each] / 1e6 for each in PEAKS))
        measured = prefix + "error" in row
        rest = f"error {row[prefix + 'error']:.1e}, {row[prefix + 'seconds']:.1f} s" if measured else "computed"
        both.append(f"{name} {peaks}, {rest}")
    print(f"{row['context']:7,} tokens: {'; '.join(both)}", flush=True)


def main() -> None:
    """Prints a line a length, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="T")
    options = parser.parse_args()
    name, dtype = options.dtype, getattr(mx, options.dtype)
    rows: list[dict[str, Any]] = []
    for S in CONTEXTS:
        rows.append(figures(S, options.new_tokens, dtype, rows))
        show(rows[-1])
    at = next(row for row in rows if row["context"] == BAR_CONTEXT)
    ratio, whole = at["above"] / at["mlx_lm_above"], at["whole"] / at["mlx_lm_whole"]
    last_line(
        "long_context",
        max(ratio, whole) <= BAR and at["error"] <= TOLERANCE[name],
        dtype=name,
        new_tokens=options.new_tokens,
        ratio=round(ratio, 4),
        whole_ratio=round(whole, 4),
        bar=BAR,
        error=at["error"],
        mlx_lm_error=at["mlx_lm_error"],
        tolerance=TOLERANCE[name],
        contexts=rows,
    )


if __name__ == "__main__":
    main()

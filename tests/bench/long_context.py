"""Memory and error of attention over a 4-bit cache, beside mlx-lm's quantised path, from 4,096 to 131,072 tokens.

    python tests/bench/long_context.py [--new-tokens 128] [--dtype float32]

One layer of Phi-4-mini: 24 query heads and 8 key heads of 128, a cache in groups of 64. The last T tokens are appended
to a cache of all others and attend to the whole context. Both get the same random arrays. Peaks in bytes: `above` is
without what was active before, `whole` is with it, cache included. Errors are relative to the largest number of dense
float64 attention over the dequantised cache. Beyond 32,768 tokens mlx-lm's peak is extrapolated linearly from its last
two, because its scores grow with the context. Bars at 32,768: both peaks at most a tenth of mlx-lm's, error at most
1e-5. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from harness import last_line, measure, option_parser
from mlx_lm.models.base import quantized_scaled_dot_product_attention
from mlx_lm.models.cache import QuantizedKVCache
from peer import HEAD_DIM

from phi4_mlx.models.attention import attention
from phi4_mlx.models.cache import KVCache

H, K = 24, 8  # query heads, key heads
BITS, GROUP = 4, 64
NEW_SEED = 1_000_000  # of the new tokens; those in the cache have the seeds from 0
SCALE = HEAD_DIM**-0.5
BAR_CONTEXT, BAR = 32_768, 0.1
CONTEXTS = (4_096, 8_192, 16_384, 32_768, 65_536, 131_072)
MEASURED_CONTEXT = 32_768  # tokens; mlx-lm's peak is extrapolated beyond
PEAKS = ("above", "whole")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}

Attend = Callable[[Any, mx.array, mx.array, mx.array], mx.array]  # cache, queries, keys, values -> [1, H, T, Dh]
Figures = dict[str, float]  # of one length: the keys that the last line has in `contexts`


def ours(cache: Any, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Appends the keys and values, and attends with the queries."""
    keys, values = cache.update_and_fetch(keys, values)
    return attention(queries, keys, values, SCALE, "causal", BITS)


def theirs(cache: Any, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """The same with mlx-lm's function, which scales the queries in place and so gets a copy."""
    keys, values = cache.update_and_fetch(keys, values)
    return quantized_scaled_dot_product_attention(queries + 0, keys, values, SCALE, "causal", GROUP, BITS)


def random_heads(heads: int, length: int, seed: int, dtype: mx.Dtype) -> mx.array:
    """Normal noise [1, heads, length, Dh]."""
    return mx.random.normal((1, heads, length, HEAD_DIM), dtype, key=mx.random.key(seed))


def run(attend: Attend, cache: Any, S: int, T: int, dtype: mx.Dtype) -> tuple[Figures, mx.array]:
    """Fills the cache with S - T tokens, then measures T more; returns the figures and the output."""
    for start in range(0, S - T, 4096):
        length = min(4096, S - T - start)
        mx.eval(cache.update_and_fetch(*(random_heads(K, length, 2 * start + part, dtype) for part in (0, 1))))
    new = [random_heads(heads, T, NEW_SEED + part, dtype) for part, heads in enumerate((H, K, K))]
    mx.eval(new)
    done = measure(attend, cache, *new)
    figures = {"above": done.above_bytes, "whole": done.peak_bytes, "seconds": round(done.seconds, 3)}
    return figures, done.result


def dense(cache: KVCache, T: int) -> np.ndarray:
    """The right output for the last T tokens of the cache, [H, T, Dh] in float64."""
    state = cache.state
    keys, values = (
        np.array(mx.dequantize(*parts, GROUP, BITS)[0].astype(mx.float32)) for parts in (state[:3], state[3:])
    )  # [K, S, Dh]
    queries = np.array(random_heads(H, T, NEW_SEED, state[1].dtype)[0].astype(mx.float32), np.float64)
    S = keys.shape[1]
    hidden = np.arange(S - T, S)[:, None] < np.arange(S)
    out = []
    for head, rows in enumerate(queries):
        scores = SCALE * rows @ keys[head // (H // K)].T
        scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out.append(weights @ values[head // (H // K)] / weights.sum(axis=-1, keepdims=True))
    return np.stack(out)


def error(output: mx.array, right: np.ndarray) -> float:
    """The largest difference, relative to the largest number."""
    return float(np.abs(np.array(output[0].astype(mx.float32)) - right).max() / np.abs(right).max())


def figures(S: int, T: int, dtype: mx.Dtype, shorter: list[Figures]) -> Figures:
    """Both at one length; `shorter` has the figures of the lengths before it."""
    cache = KVCache(BITS)
    mine, output = run(ours, cache, S, T, dtype)
    right = dense(cache, T)
    row = {"context": S, "cache": cache.nbytes, **mine, "error": error(output, right)}
    del cache, output
    if S <= MEASURED_CONTEXT:
        other, output = run(theirs, QuantizedKVCache(GROUP, BITS), S, T, dtype)
        other["error"] = error(output, right)
    else:
        other = extrapolated(S, *shorter[-2:])
    return row | {f"mlx_lm_{name}": value for name, value in other.items()} | {"computed": S > MEASURED_CONTEXT}


def extrapolated(S: int, a: Figures, b: Figures) -> Figures:
    """mlx-lm's peaks at length S, on the line through two shorter lengths."""
    steps = (S - b["context"]) / (b["context"] - a["context"])
    ends = {peak: (a[f"mlx_lm_{peak}"], b[f"mlx_lm_{peak}"]) for peak in PEAKS}
    return {peak: round(last + steps * (last - first)) for peak, (first, last) in ends.items()}


def show(row: Figures) -> None:
    """Prints the figures of one length."""
    both = []
    for name, prefix in (("ours", ""), ("mlx-lm", "mlx_lm_")):
        peaks = "{:.1f} MB above, {:.1f} whole".format(*(row[prefix + peak] / 1e6 for peak in PEAKS))
        measured = prefix + "error" in row
        rest = f"error {row[prefix + 'error']:.1e}, {row[prefix + 'seconds']:.1f} s" if measured else "extrapolated"
        both.append(f"{name} {peaks}, {rest}")
    print(f"{row['context']:7,} tokens: {'; '.join(both)}", flush=True)


def main() -> None:
    """Prints a line for each length, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="T")
    options = parser.parse_args()
    name, dtype = options.dtype, getattr(mx, options.dtype)
    rows: list[Figures] = []
    for S in CONTEXTS:
        rows.append(figures(S, options.new_tokens, dtype, rows))
        show(rows[-1])
    at = next(row for row in rows if row["context"] == BAR_CONTEXT)
    ratio, whole = at["above"] / at["mlx_lm_above"], at["whole"] / at["mlx_lm_whole"]
    last_line(
        "long_context",
        dtype=name,
        new_tokens=options.new_tokens,
        ratio=round(ratio, 4),
        whole_ratio=round(whole, 4),
        bar=BAR,
        error=at["error"],
        mlx_lm_error=at["mlx_lm_error"],
        tolerance=TOLERANCE[name],
        contexts=rows,
        ok=max(ratio, whole) <= BAR and at["error"] <= TOLERANCE[name],
    )


if __name__ == "__main__":
    main()

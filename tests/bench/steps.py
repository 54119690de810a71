"""Operations and host time of a decode step of 32 layers, beside mlx-lm.

    python tests/bench/steps.py [--runs 200]

Both models have Phi-4-mini's config at an eighth of its width, over the same 4-bit arrays. Three figures:

- nodes: nodes of the graph that `model(ids, cache)` builds. MLX's CPU build expands RMS norms, RoPE and attention.
- operations: the same with each call of `mx.fast` as one node, as on Metal.
- host: time to build the graph without evaluating it; the median of the ratios of pairs.

The previous step is evaluated before nodes are counted, so that the caches are leaves. Bars: 0.9, 0.8 and 0.6 of
mlx-lm's. The last line is JSON.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from harness import alternate, last_line, median_ratio, option_parser, timed
from mlx_lm.models.cache import make_prompt_cache
from peer import config_of, logits_difference, random_pair

LAYERS, PROMPT = 32, 100
BARS = {"nodes": 0.9, "operations": 0.8, "host": 0.6}
TOKEN = mx.array([[3]])

Step = Callable[[], mx.array]


def steps() -> tuple[Step, Step, float]:
    """(our decode step, mlx-lm's, the difference of their logits), after a prompt and two warm-up steps."""
    ours, theirs = random_pair(config_of(LAYERS, kv_heads=1, vocab_size=512))
    difference = logits_difference(ours, theirs)
    our_cache, their_cache = ours.make_cache(), make_prompt_cache(theirs)

    def settled(model: Any, cache: Any, ids: mx.array) -> None:
        mx.eval(model(ids, cache))
        mx.eval([layer.state for layer in cache])

    for model, cache in ((ours, our_cache), (theirs, their_cache)):
        settled(model, cache, mx.ones((1, PROMPT), mx.int32))
        settled(model, cache, TOKEN)
        settled(model, cache, TOKEN)
    return lambda: ours(TOKEN, our_cache), lambda: theirs(TOKEN, their_cache), difference


def operations(step: Step, extra: list[mx.array]) -> Counter[str]:
    """Nodes of a step by name. `extra` collects outputs that the graph would otherwise lose."""
    extra.clear()
    out = step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.dot"
        mx.export_to_dot(str(path), out, *extra)
        dot = path.read_text()
    mx.eval(out, *extra)
    return Counter(re.findall(r'label ?= ?"([^"]*)"[^\]]*shape ?= ?rectangle', dot))


@contextmanager
def fast_calls_as_one(extra: list[mx.array]) -> Iterator[None]:
    """Makes each call of `mx.fast` one node: a cumulative sum, which `mx.compile` does not merge with others."""
    names = ("rms_norm", "rope", "scaled_dot_product_attention")
    real = {name: getattr(mx.fast, name) for name in names}

    def one(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return mx.cumsum(x, axis=-1)

    def attention(queries: mx.array, keys: mx.array, values: mx.array, **_: Any) -> mx.array:
        extra.extend((keys, values))  # the stub does not read them, so keep them in the graph as outputs
        return one(queries)

    for name, stub in zip(names, (one, one, attention), strict=True):
        setattr(mx.fast, name, stub)
    try:
        yield
    finally:
        for name in names:
            setattr(mx.fast, name, real[name])


def count(step: Step, other: Step, extra: list[mx.array], title: str) -> tuple[int, int]:
    """Nodes of both; prints the names whose counts differ."""
    ours, theirs = operations(step, extra), operations(other, extra)
    a, b = ours.total(), theirs.total()
    print(f"{title}: ours {a:,}, mlx-lm {b:,}, ratio {a / b:.3f}")
    for name in sorted(ours | theirs, key=lambda name: ours[name] - theirs[name]):
        if ours[name] != theirs[name]:
            print(f"    {name:40.40} {ours[name]:6,} {theirs[name]:6,}")
    return a, b


def host_seconds(step: Step) -> float:
    """Time to build the graph of a step; the step is then evaluated."""
    out, seconds = timed(step)
    mx.eval(out)
    return seconds


def main() -> None:
    """Prints the three comparisons, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs

    ours, theirs, difference = steps()
    nodes = count(ours, theirs, [], "nodes")
    mine, other = alternate(partial(host_seconds, ours), partial(host_seconds, theirs), runs)
    host = median_ratio(mine, other)
    print(f"host: ours {1000 * median(mine):.2f} ms, mlx-lm {1000 * median(other):.2f} ms, ratio {host:.3f}")
    extra: list[mx.array] = []
    with fast_calls_as_one(extra):  # before the steps are traced
        ours, theirs, _ = steps()
        calls = count(ours, theirs, extra, "operations")

    ratios = {"nodes": nodes[0] / nodes[1], "operations": calls[0] / calls[1], "host": host}
    last_line(
        "steps",
        layers=LAYERS,
        nodes=nodes[0],
        mlx_lm_nodes=nodes[1],
        operations=calls[0],
        mlx_lm_operations=calls[1],
        host_ms=round(1000 * median(mine), 3),
        mlx_lm_host_ms=round(1000 * median(other), 3),
        ratios={name: round(ratio, 3) for name, ratio in ratios.items()},
        bars=BARS,
        runs=runs,
        logits_difference=difference,
        ok=all(ratios[name] <= bar for name, bar in BARS.items()) and difference < 1e-4,
    )


if __name__ == "__main__":
    main()

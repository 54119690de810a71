"""Costs of Phi-4-mini-flash-reasoning: ratios of CPU time, and bytes.

    python tests/bench/flash.py [--only NAME ...] [--width 128] [--runs 3]

- first_token: the first token after 4,096 tokens, beside the logits of all of them. Bar: 0.60.
- growth: a prefill of 4,096 tokens beside one of 2,048. Bar: 2.15.
- second_turn: 24 tokens after 4,096 cached ones, beside a prefill of all. The same token must follow. Bar: 0.1.
- decode: a step beside one of Phi-4-mini with 512, 4,096 and 16,384 cached tokens. Bars: 1.2, 0.75, 0.55.
- compiled: a compiled decode step beside the plain one, at width 64; equal to the bit. Bar: 0.75.
- scan: a Mamba layer beside mlx-lm's, 2,048 tokens, the same weights. Bar: 0.8.
- peak: memory of a scan at the published width beyond its four arrays [T, E] (u, dt, and the outputs twice while their
  chunks are joined), at 512 and 4,096 tokens. Bar: 64 MiB.
- memory: cached bytes per token beside one layer's keys and values, measured. Bar: 1.05. A context of 32,768 tokens
  beside Phi-4-mini's, from the published shapes.

All models have 32 layers (memory: 8), the published proportions, random float32 weights and 512 tokens of vocabulary,
so that the head costs next to nothing. The first three parts use `--width`. decode compares both models at an eighth of
their widths, with half of their heads, over random caches. Times are CPU seconds of the process; a figure is the median
of the ratios of pairs. The last line is JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
from harness import alternate, last_line, median_ratio, option_parser
from mlx.utils import tree_map
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.mamba import MambaBlock, ModelArgs
from peer import PRESETS

from phi4_mlx.config.sambay import SambaYConfig
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models import text
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.sambay import Mamba, Model
from phi4_mlx.models.scan import selective_scan
from tests.tiny_sambay import make_tiny_sambay, sambay_config_dict

TOKENS, NEW, CONTEXTS = 4096, 24, (512, 4096, 16384)
BARS = {
    "first_token": 0.60,
    "growth": 2.15,
    "second_turn": 0.1,
    "decode 512": 1.2,
    "decode 4096": 0.75,
    "decode 16384": 0.55,
    "compiled": 0.75,
    "scan": 0.8,
    "peak 512": 64.0,
    "peak 4096": 64.0,
    "token_bytes": 1.05,
}
# Source: config.json of microsoft/Phi-4-mini-flash-reasoning.
PUBLISHED = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 40,
    "num_key_value_heads": 20,
    "vocab_size": 200_064,
    "max_position_embeddings": 262_144,
    "sliding_window": 512,
    "mamba_d_state": 16,
}

Figures = dict[str, float]


def flash(width: int, head_dim: int, **overrides: Any) -> Model:
    """A random model of the published proportions; `width / head_dim` must be a multiple of 4."""
    heads = width // head_dim
    shapes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": 512,
        "max_position_embeddings": 65_536,
    }
    return make_tiny_sambay(**PUBLISHED | shapes | overrides)


def phi_4_mini() -> text.Model:
    """Phi-4-mini at an eighth of its width: half of its heads, a quarter of their width."""
    raw = PRESETS["phi-4-mini"].to_dict()
    rope = raw["rope_scaling"]
    shapes = {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "rope_scaling": rope | {name: rope[name][::4] for name in ("short_factor", "long_factor")},
    }
    model = text.Model(ModelConfig.from_dict(raw | shapes))
    model.update(tree_map(lambda array: 0.05 * mx.random.normal(array.shape), model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


def random_ids(length: int) -> list[int]:
    ids: list[int] = mx.random.randint(0, 512, (length,), key=mx.random.key(1)).tolist()
    return ids


def cpu_s(run: Callable[[], object]) -> float:
    """CPU seconds of one call, over all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def ratio(ours: Callable[[], object], theirs: Callable[[], object], runs: int) -> float:
    """The median ratio of CPU seconds."""
    mine, other = alternate(lambda: cpu_s(ours), lambda: cpu_s(theirs), runs)
    print(f"    CPU seconds: {min(mine):.4f} and {min(other):.4f} at least", flush=True)
    return median_ratio(mine, other)


def first(model: Model, ids: list[int], cache: PromptCache | None = None) -> int:
    """The first token of the answer to a prompt."""
    return next(iter(generate_step(ids, model, max_tokens=1, cache=cache)))[0]


def all_logits(model: Model, ids: list[int], step: int = 2048) -> None:
    """The logits of all tokens, in the chunks of a prefill."""
    cache = model.make_cache()
    for at in range(0, len(ids), step):
        mx.eval(model(mx.array([ids[at : at + step]]), cache), [layer.state for layer in cache])


def first_token(width: int, runs: int) -> Figures:
    model, ids = flash(width, width // 8), random_ids(TOKENS)
    return {"first_token": ratio(lambda: first(model, ids), lambda: all_logits(model, ids), runs)}


def growth(width: int, runs: int) -> Figures:
    model, ids = flash(width, width // 8), random_ids(TOKENS)
    return {"growth": ratio(lambda: first(model, ids), lambda: first(model, ids[: TOKENS // 2]), runs)}


def second_turn(width: int, runs: int) -> Figures:
    model, ids = flash(width, width // 8), random_ids(TOKENS + NEW)
    cache, tokens = model.make_cache(), set()
    first(model, ids[:TOKENS], cache)

    def warm() -> None:
        rest = cache.reuse(ids)
        assert len(rest) == (NEW if not tokens else 1), "a repeated prompt runs its last token alone"
        cache.truncate(cache.reusable(TOKENS))
        tokens.add(first(model, ids[TOKENS:], cache))

    found = ratio(warm, lambda: tokens.add(first(model, ids)), runs)
    assert len(tokens) == 1, "the second turn starts with another token"
    return {"second_turn": found}


def random_cache(model: LanguageModel, tokens: int) -> PromptCache:
    """A cache of `tokens` tokens with random contents."""
    small = model.make_cache("long")
    mx.eval(model.hidden(mx.ones((1, 2), mx.int32), small))

    def state(layer: Any) -> list[mx.array]:
        grown = []
        for name, array in zip(layer.state_names, layer.state, strict=True):
            if name == "length":
                grown.append(mx.array([tokens]))
                continue
            shape = list(array.shape)
            if name in ("keys", "values"):
                shape[2] = layer.kept(tokens)
            grown.append(mx.random.normal(shape))
        return grown

    cache = model.make_cache("long")
    cache.restore(random_ids(tokens), [state(layer) for layer in small], "long")
    return cache


def decode(width: int, runs: int) -> Figures:
    models: list[LanguageModel] = [flash(320, 16), phi_4_mini()]
    found, token = {}, mx.array([[3]])
    for context in CONTEXTS:
        caches = [(model, random_cache(model, context)) for model in models]
        steps = [lambda model=model, cache=cache: mx.eval(model(token, cache)) for model, cache in caches]
        for step in steps * 3:  # grows the buffers and traces the step
            step()
        found[f"decode {context}"] = ratio(*steps, 8 * runs)
    return found


def compiled(width: int, runs: int) -> Figures:
    model, token = flash(64, 8), mx.array([[3]])
    one = random_cache(model, 100)
    for _ in range(3):
        mx.eval(model(token, one))
    other = one.fork(one.offset)

    def plain() -> mx.array:
        return model.logits(model.hidden(token, other, embeddings=model.head(token)))

    for _ in range(16):
        assert mx.array_equal(model(token, one), plain()), "the compiled step gives other logits"
    return {"compiled": ratio(lambda: mx.eval(model(token, one)), lambda: mx.eval(plain()), 16 * runs)}


def scan(width: int, runs: int) -> Figures:
    config = SambaYConfig.from_dict(sambay_config_dict(hidden_size=256, mamba_d_state=16))
    ours = Mamba(config)
    theirs = MambaBlock(
        ModelArgs(
            "mamba", vocab_size=512, hidden_size=256, intermediate_size=config.mamba_width, state_size=16,
            num_hidden_layers=1, conv_kernel=4, use_bias=False, use_conv_bias=True, time_step_rank=config.mamba_dt_rank,
        )
    )  # fmt: skip
    conv = {"weight": ours.conv1d.weight.swapaxes(1, 2), "bias": ours.conv1d.bias}
    theirs.update(ours.parameters() | {"conv1d": conv})
    x = mx.random.normal((1, 2048, 256), key=mx.random.key(0))
    mx.eval(x, ours.parameters(), theirs.parameters())
    assert mx.allclose(ours(x, None, None)[0], theirs(x, ArraysCache(2)), atol=1e-4), "mlx-lm's layer differs"
    return {"scan": ratio(lambda: mx.eval(ours(x, None, None)[0]), lambda: mx.eval(theirs(x, ArraysCache(2))), runs)}


def peak(width: int, runs: int) -> Figures:
    E, N = 2 * PUBLISHED["hidden_size"], PUBLISHED["mamba_d_state"]
    found = {}
    for T in (512, 4096):
        u, dt = mx.random.normal((1, T, E)), mx.random.uniform(shape=(1, T, E))
        weights, readout = mx.random.normal((2, 1, T, N))
        arrays = [u, dt, -mx.random.uniform(shape=(N, E)), weights, readout, mx.zeros((1, N, E))]
        mx.eval(arrays)
        mx.reset_peak_memory()
        mx.eval(selective_scan(*arrays))
        beyond = mx.get_peak_memory() - 4 * u.nbytes
        print(f"    {T} tokens: {beyond / 2**20:.1f} MiB beyond arrays of {u.nbytes / 2**20:.0f} MiB each", flush=True)
        found[f"peak {T}"] = beyond / 2**20
    return found


def memory(width: int, runs: int) -> Figures:
    model = flash(64, 8, num_hidden_layers=8)
    sizes = []
    for tokens in (1024, 3072):
        cache = random_cache(model, tokens)
        sizes.append(cache.nbytes)
    layer_bytes = 2 * 4 * model.config.num_key_value_heads * model.config.head_dim
    published = []
    for whole in (Model(SambaYConfig.from_dict(PUBLISHED)), text.Model(PRESETS["phi-4-mini"])):
        whole.set_dtype(mx.bfloat16)  # never evaluated
        cost = whole.context_cost()
        published.append(cost.fixed_bytes + 32_768 * cost.token_bytes)
    return {
        "token_bytes": (sizes[1] - sizes[0]) / 2048 / layer_bytes,
        "context_mb": published[0] / 1e6,
        "phi_4_mini_context_mb": published[1] / 1e6,
    }


PARTS: Mapping[str, Callable[[int, int], Figures]] = {
    part.__name__: part for part in (first_token, growth, second_turn, decode, compiled, scan, peak, memory)
}


def main() -> None:
    """Prints a line for each figure, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--width", type=int, default=128, help="hidden size of first_token, growth and second_turn")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()

    figures: Figures = {}
    for name in options.only:
        print(name, flush=True)
        found = PARTS[name](options.width, options.runs)
        for each, value in found.items():
            print(f"    {each}: {value:.3f}" + (f", bar {BARS[each]}" if each in BARS else ""), flush=True)
        figures |= found
        mx.clear_cache()
    last_line(
        "flash",
        width=options.width,
        runs=options.runs,
        figures={name: round(value, 3) for name, value in figures.items()},
        bars=BARS,
        ok=all(value <= BARS[name] for name, value in figures.items() if name in BARS),
    )


if __name__ == "__main__":
    main()

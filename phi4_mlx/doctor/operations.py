"""Checks of single operations on random arrays, in each dtype that packages have.

Shapes: B batch, T new tokens, S cached plus new, H query heads, K key/value heads, Dh head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from phi4_mlx.doctor.check import Check
from phi4_mlx.doctor.tolerance import EXACT, PRODUCT, Tolerance, exponentials, rounding, sines
from phi4_mlx.models import padded
from phi4_mlx.models.attention import attention
from phi4_mlx.models.cache import KVCache
from phi4_mlx.models.dequantized import dequantize_products
from phi4_mlx.models.differential import difference
from phi4_mlx.models.fused import LayerNorm, RMSNorm, rope
from phi4_mlx.models.safe import safe
from phi4_mlx.models.sambay import swiglu
from phi4_mlx.models.scan import selective_scan, short_scan
from phi4_mlx.models.state import WindowCache

NAMES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}
WIDTH = 1024  # of the matrices; MLX has a kernel of its own for multiples of 512
NORMS = 192, 3072, 5120  # the demo's width, Phi-4-mini's, and Phi-4's, which MLX's norms take in several parts
FAR = 2048  # position of the last rotated token
LONG = 1100  # tokens of one head whose attention a CPU runs in two slices


def random(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The same normal numbers on every device."""
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


def operation_checks() -> list[Check]:
    """The checks of this file."""
    found: list[Check] = []
    for dtype, name in NAMES.items():
        found += [
            Check(f"matrix product, {name}", (), partial(_product, dtype), rounding(dtype, WIDTH)),
            *(
                Check(
                    f"{bits}-bit product, {name}", ("products",), partial(_quantized, dtype, bits),
                    rounding(dtype, WIDTH, 2, PRODUCT * WIDTH // 256),
                )
                for bits in (4, 8)
            ),
            Check(f"norms, {name}", ("norms",), partial(_norms, dtype), rounding(dtype, max(NORMS), 3, 2)),
            Check(f"rope, {name}", ("rope",), partial(_rope, dtype), rounding(dtype, FAR**2, 2) + sines()),
            Check(f"attention, {name}", ("attention", "slices"), partial(_attention, dtype), _softmax(dtype)),
            Check(
                f"attention of padded heads, {name}", ("padding", "attention"), partial(_padded, dtype),
                _softmax(dtype),
            ),
            *(
                Check(
                    f"attention over {bits}-bit keys in blocks, {name}", ("blocks",), partial(_blocks, dtype, bits),
                    _softmax(dtype),
                )
                for bits in (4, 8)
            ),
        ]  # fmt: skip
    f32 = mx.float32
    return [
        *found,
        Check("attention in slices", ("slices", "attention"), _slices, rounding(f32, LONG, 4) + exponentials()),
        Check("differential attention", ("slices",), _differential, rounding(f32, 128, 8) + exponentials(2)),
        Check("caches that grow", ("buffers",), _caches, EXACT),
        Check("compiled function", ("compiled",), _compiled, rounding(f32, 1, 8) + exponentials()),
        Check("selective scan and its gradient", ("scan",), _scan, rounding(f32, 64, 16) + exponentials(2)),
    ]


def _softmax(dtype: mx.Dtype) -> Tolerance:
    """The tolerance of attention: two products with a softmax between them."""
    return rounding(dtype, 128, 4, 2) + exponentials()


def _product(dtype: mx.Dtype) -> list[mx.array]:
    matrix = random(1, 192, WIDTH, dtype=dtype)
    return [random(rows, rows, WIDTH, dtype=dtype) @ matrix.T for rows in (1, 7, 64)]


def _quantized(dtype: mx.Dtype, bits: int) -> list[mx.array]:
    """Products of a vector, of a few rows and of many, with a linear layer, a padded one and a tied head."""
    module = nn.Module()
    module.linear, module.padded = nn.Linear(WIDTH, 192, bias=False), padded.PaddedLinear(72, 192)
    module.small_groups, module.head = nn.Linear(WIDTH, 192, bias=False), nn.Embedding(192, WIDTH)
    for number, layer in enumerate(module.children().values()):
        layer.update({name: random(number, *array.shape) for name, array in layer.items()})
    with mx.stream(mx.cpu):  # a GPU may round a number between two steps to the other one
        sizes = {"linear": 64, "padded": 32, "small_groups": 32, "head": 64}
        nn.quantize(module, bits=bits, class_predicate=lambda name, _: {"group_size": sizes[name], "bits": bits})
        mx.eval(module.parameters())
    module.set_dtype(dtype)
    if safe("products"):
        dequantize_products(module)
    found = []
    for rows in (1, 7, 40):
        x = random(rows, rows, WIDTH, dtype=dtype)
        found += [module.linear(x), module.padded(x[:, :72]), module.small_groups(x), module.head.as_linear(x)]
    return found


def _norms(dtype: mx.Dtype) -> list[mx.array]:
    found = []
    for width in NORMS:
        for norm in (RMSNorm(width), LayerNorm(width)):
            norm.update({"weight": 1 + 0.1 * random(1, width)} | ({"bias": random(2, width)} if "bias" in norm else {}))
            norm.set_dtype(dtype)
            found += [norm(3 * random(rows, 1, rows, width, dtype=dtype)) for rows in (1, 5)]
    return found


def _rope(dtype: mx.Dtype) -> list[mx.array]:
    """Heads that rotate in part, at one position for all rows and at one for each."""
    periods = mx.array((10000.0 ** (np.arange(24) / 24)).astype(np.float32))
    heads = random(1, 3, 4, 6, 64, dtype=dtype)
    last = mx.array([0, 37, FAR])
    cases = [(heads, 0), (heads, FAR - 5), (heads, last), (heads[:, :, :1], last), (heads[:1, :, :1], mx.array(FAR))]
    return [rope(each, 48, offset, periods) for each, offset in cases]


def _heads(dtype: mx.Dtype, T: int, S: int, Dh: int, H: int = 6, K: int = 2, B: int = 1) -> tuple[mx.array, ...]:
    """Queries [B, H, T, Dh], keys and values [B, K, S, Dh]."""
    shapes = (B, H, T, Dh), (B, K, S, Dh), (B, K, S, Dh)
    queries, keys, values = (random(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes))
    return queries, keys, values


def _attention(dtype: mx.Dtype) -> list[mx.array]:
    """Decode steps, whole prompts, a chunk after others, and rows of several lengths."""
    found = []
    for Dh in (64, 96, 128):
        for T, S in ((1, 70), (1, 1100), (64, 64), (40, 40), (24, 90)):  # MLX has a kernel for more than 1,023 keys
            mask = "causal" if T > 1 else None
            queries, keys, values = _heads(dtype, T, S, Dh)
            found.append(attention(queries, keys, values, Dh**-0.5, mask, None))
        queries, keys, values = _heads(dtype, 1, 50, Dh, B=3)
        rows = mx.arange(50) >= mx.array([0, 13, 49])[:, None, None, None]
        found.append(attention(queries, keys, values, Dh**-0.5, rows, None))
    return found


def _padded(dtype: mx.Dtype) -> list[mx.array]:
    """Heads of 72, the towers' own, in a width of 80, which a CPU does not need; with and without a mask."""
    width = None if safe("padding") else 80
    queries, keys, values = _heads(dtype, 30, 30, 72, H=4, K=4, B=2)
    seen = mx.arange(30) < mx.array([30, 21])[:, None, None, None]
    return [padded.attention(queries, keys, values, mask, width) for mask in (None, seen)]


def _blocks(dtype: mx.Dtype, bits: int) -> list[mx.array]:
    """A chunk over three blocks of keys, and a decode step of rows of several lengths."""
    found: list[mx.array] = []
    rows = mx.arange(90) >= mx.array([0, 71])[:, None, None, None]
    masks: list[tuple[int, int, int, str | mx.array]] = [(1, 128, 600, "causal"), (2, 1, 90, rows)]
    for B, T, S, mask in masks:
        queries, *held = _heads(dtype, T, S, 64, H=3, K=1, B=B)
        with mx.stream(mx.cpu):
            keys, values = (tuple(mx.quantize(each, group_size=64, bits=bits)) for each in held)
            mx.eval(keys, values)
        found.append(attention(queries, keys, values, 0.125, mask, bits))
    return found


def _slices() -> list[mx.array]:
    queries, keys, values = _heads(mx.float32, LONG, LONG, 8, H=1, K=1)
    return [attention(queries, keys, values, 8**-0.5, "causal", None)]


def _differential() -> list[mx.array]:
    """A window that is narrower than the prompt, all keys, a decode step; and in training, with the gradient."""
    P, G, Dh, S = 2, 2, 16, 50

    def attend(window: int | None, training: bool, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return difference(queries, keys, values, mx.array(0.4), window, training=training)

    def arrays(T: int) -> list[mx.array]:
        shapes = (1, 2, P, G, T, Dh), (1, 2, P, S, Dh), (1, P, S, 2 * Dh)
        return [random(seed, *shape) * (Dh**-0.5 if not seed else 1) for seed, shape in enumerate(shapes)]

    found = [attend(window, False, *arrays(T)) for T, window in ((S, 16), (20, None), (1, 16))]

    def loss(*given: mx.array) -> mx.array:
        return attend(16, True, *given).square().sum()

    gradient: Callable[..., Sequence[mx.array]] = mx.grad(loss, argnums=(0, 1, 2))
    return [*found, *gradient(*arrays(S))]


def _caches() -> list[mx.array]:
    """Keys and values of a prompt, of steps beyond a buffer's end, and of tokens after some were taken back."""
    found: list[mx.array] = []
    caches: list[KVCache | WindowCache] = [KVCache(), WindowCache(40)]
    for cache in caches:
        for number, (T, back) in enumerate(((250, 0), (3, 2), (1, 0), (8, 3), (1, 0), (1, 0))):
            found += cache.update_and_fetch(random(number, 1, 2, T, 16), random(number + 9, 1, 2, T, 16))
            assert cache.trim(back) == back
    return found


def _compiled() -> list[mx.array]:
    return [swiglu(random(rows, rows, WIDTH), random(9, rows, WIDTH)) for rows in (1, 5)]


def _scan() -> list[mx.array]:
    """A prompt, a few tokens, one token; and the gradients of a prompt of two packed samples."""
    B, E, N = 2, 32, 8

    def arrays(T: int) -> list[mx.array]:
        u, weights, readout = random(1, B, T, E), random(2, B, T, N), random(3, B, T, N)
        dt, rates = mx.abs(random(4, B, T, E)) * 0.1, -mx.abs(random(5, N, E)) - 0.1
        return [u, dt, rates, weights, readout, random(6, B, N, E)]

    found = [*selective_scan(*arrays(40))]
    for T in (5, 1):
        outputs, states = short_scan(*arrays(T))
        found += [outputs, *states]
    keep = mx.broadcast_to((mx.arange(40) != 17).astype(mx.float32), (B, 40))

    def loss(*given: mx.array) -> mx.array:
        u, dt, rates, weights, readout, before = given
        outputs, state = selective_scan(u, dt, rates, weights, readout, before, keep)
        return outputs.square().sum() + state.sum()

    gradient: Callable[..., Sequence[mx.array]] = mx.grad(loss, argnums=tuple(range(6)))
    return [*found, *gradient(*arrays(40))]

"""The fast paths that PHI4_MLX_SAFE turns off by name; each has a slow twin with the same results.

A path asks `safe("compiled")` where it chooses, and takes its twin if that is true. `python -m phi4_mlx doctor`
compares both on this machine, and names the paths to turn off.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Literal, get_args

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.suggestion import suggestion

VARIABLE = "PHI4_MLX_SAFE"

FastPath = Literal[
    "attention", "blocks", "buffers", "chunks", "compiled", "loss", "norms", "padding", "products", "queue",
    "recompute", "rope", "rows", "scan", "slices", "speculation", "wired",
]  # fmt: skip

TWINS: dict[FastPath, str] = {
    "attention": "attention as products and a softmax, in place of MLX's fused kernel",
    "blocks": "attention over quantised keys and values dequantised whole, in place of blocks of keys",
    "buffers": "keys and values appended by copies, in place of writes into buffers that grow",
    "chunks": "prompts prefilled whole, in place of chunks",
    "compiled": "decode steps built anew for each token, in place of compiled ones",
    "loss": "the loss of all logits at once, in place of chunks with a gradient of their own",
    "norms": "norms as sums and products, in place of MLX's fused kernels",
    "padding": "heads of the towers in their own width, in place of the widths of MLX's fused attention",
    "products": "4-bit and 8-bit matrices dequantised for each product, in place of MLX's quantised kernels",
    "queue": "each step computed before the next one is built, in place of a queue",
    "recompute": "all activations of a training step kept, in place of computed again",
    "rope": "rotations as sines and cosines, in place of MLX's fused kernel",
    "rows": "one sequence in a forward pass, in place of rows side by side",
    "scan": "the selective scan token by token, in place of chunks with a gradient of their own",
    "slices": "attention over all queries at once, in place of slices",
    "speculation": "no tokens guessed ahead",
    "wired": "weights that the system may page out, in place of wired ones",
}
"""Each fast path -> its slow twin, in words."""

_off: frozenset[str] | None = None  # None until the environment is read, once


def safe(path: FastPath) -> bool:
    """True if a fast path is off.

    Raises:
        RequestError: PHI4_MLX_SAFE has an unknown name.
    """
    return path in (_read() if _off is None else _off)


def switched_off() -> list[str]:
    """The fast paths that are off, sorted.

    Raises:
        RequestError: PHI4_MLX_SAFE has an unknown name.
    """
    return sorted(_read() if _off is None else _off)


def notice() -> str | None:
    """A line for users that names the paths that are off; None if all are on.

    Raises:
        RequestError: PHI4_MLX_SAFE has an unknown name.
    """
    names = switched_off()
    return f"{VARIABLE}={','.join(names)}: slower, with the same results" if names else None


@contextlib.contextmanager
def without(*paths: FastPath) -> Iterator[None]:
    """Turns off further fast paths, for all threads; a model made or compiled before may keep what it has chosen."""
    global _off
    before = frozenset(switched_off())
    _off = before | {*paths}
    try:
        yield
    finally:
        _off = before


def _read() -> frozenset[str]:
    global _off
    known = get_args(FastPath)
    names = [name for name in (part.strip() for part in os.environ.get(VARIABLE, "").split(",")) if name]
    for name in names:
        if name not in known:
            raise RequestError(
                f"{VARIABLE} names {name!r:.60}, which is no fast path; known are {', '.join(known)}"
                f"{suggestion(name, known)}"
            )
    _off = frozenset(names)
    return _off

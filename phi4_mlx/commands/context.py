"""`python -m phi4_mlx context`: prints the memory plan of a model, and the longest context that fits this machine."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.amount import size
from phi4_mlx.terminal.command import Idle, Parser, run, typed
from phi4_mlx.terminal.options import add_model_options, load_options

if TYPE_CHECKING:
    from phi4_mlx.generation.memory import ContextPlan
    from phi4_mlx.models.model import LanguageModel


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _context, argv)


def _parser() -> Parser:
    parser = Parser(
        prog=typed("context"), description="Print the memory that contexts of a model need, without running it."
    )
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.idle.append(Idle(("chat_format",), lambda args: True, "here: no prompt is run"))
    return parser


def _context(args: argparse.Namespace) -> None:
    from phi4_mlx.checkpoint import load
    from phi4_mlx.generation.memory import plan_context
    from phi4_mlx.hub import DEFAULT_MODEL

    name = args.model or DEFAULT_MODEL
    model, _ = load(name, **load_options(args), lazy=True)
    plans: dict[int | None, ContextPlan] = {None: plan_context(model)}
    for bits in (8, 4):
        with contextlib.suppress(RequestError):  # a model whose cache cannot be quantised
            plans[bits] = plan_context(model, bits)
    plain = plans[None]
    powers = [2**n for n in range(9, 40) if 2**n < plain.longest]
    lengths = [*powers[-6:], plain.longest]
    parts = _parts(model)
    if args.json:
        rows = [
            {"tokens": n, "kv_bits": bits, "cache_bytes": plan.cache_bytes(n), "peak_bytes": plan.peak_bytes(n)}
            for n in lengths
            for bits, plan in plans.items()
        ]
        longest = [{"kv_bits": bits, "tokens": plan.most_tokens} for bits, plan in plans.items()]
        weights = {"weights_bytes": plain.weights_bytes, "parts_bytes": parts, "limit_bytes": plain.limit_bytes}
        print(json.dumps({"model": name} | weights | {"longest": longest, "contexts": rows}))
        return
    heads = ["" if bits is None else f"--kv-bits {bits}" for bits in plans]
    print(f"{name}: weights {size(plain.weights_bytes)}; this machine allows {size(plain.limit_bytes)}")
    if len(parts) > 1:
        of_these = ", ".join(f"{size(nbytes)} {part}" for part, nbytes in parts.items())
        print(f"Of these, {of_these}; all but the decoder are read at their first use.")
    print(f"{'tokens':>10}" + "".join(f"  {head:>13}" for head in heads))
    for n in lengths:
        cells = [size(plan.peak_bytes(n)) + (" " if n <= plan.most_tokens else "!") for plan in plans.values()]
        print(f"{n:>10,}" + "".join(f"  {cell:>13}" for cell in cells))
    print("at most   " + "".join(f"  {f'{plan.most_tokens:,} ':>13}" for plan in plans.values()))
    print("Weights, cache and activations of a prefill together; ! exceeds what this machine allows.")
    if note := model.config.context_note:
        print(f"The context holds {plain.longest:,} tokens{note}.")


def _parts(model: LanguageModel) -> dict[str, int]:
    """The bytes of the decoder, and of the towers and adapters that a model brings along."""
    from mlx.utils import tree_flatten

    towers = sum(int(array.nbytes) for name, array in tree_flatten(model.parameters()) if model.on_demand(name))
    parts = {"decoder": model.weights_bytes - towers} | ({"towers for media": towers} if towers else {})
    adapters = {} if model.adapters is None else model.adapters.nbytes
    return parts | {f"{name} adapter": nbytes for name, nbytes in adapters.items()}

"""`python -m phi4_mlx compare`: how far the next-token distributions of two models are apart."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from phi4_mlx.terminal.amount import amount, size
from phi4_mlx.terminal.command import Parser, progress_bar, run, typed, word

if TYPE_CHECKING:
    from phi4_mlx.evaluation.compare import Comparison, Figure

_COLUMN = 36  # characters of a model's column


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _compare, argv)


def _parser() -> Parser:
    parser = Parser(
        typed("compare"),
        "Compare two models on data: KL divergence, agreement of their likeliest tokens, and perplexity. One model is "
        "in memory at a time.",
    )
    add = parser.add_argument
    add("a", type=word, metavar="A", help="a folder, a Hugging Face id or an embedded model, such as the original")
    add("b", type=word, metavar="B", help="likewise, such as a quantised package; an adapter is fused first")
    add(
        "--data", type=word, required=True, metavar="FILE",
        help="samples in a format of training, best not those that a model was made with: a JSONL or Parquet file, a "
        "folder with train.jsonl, or a Hugging Face dataset",
    )  # fmt: skip
    add("--json", action="store_true", help="print one line of JSON instead of the table")
    return parser


def _compare(args: argparse.Namespace) -> None:
    import dataclasses
    import json

    from phi4_mlx.evaluation.compare import compare  # here, so that --help and a mistyped option cost nothing

    with progress_bar("comparing", lambda count: f"{count:,.0f}") as progress:
        comparison = compare(args.a, args.b, args.data, progress)
    print(json.dumps(dataclasses.asdict(comparison)) if args.json else table(comparison))


def table(comparison: Comparison) -> str:
    """The comparison as lines of text, a column for each model."""
    from phi4_mlx.evaluation.compare import NOTED

    sides = comparison.a, comparison.b
    intervals = "; in brackets 95 % intervals over samples" if comparison.samples > 1 else ""
    rows = [
        ("weights", [size(side.weights_bytes) for side in sides]),
        ("perplexity", [_shown(side.perplexity) for side in sides]),
        ("KL to the other", [_shown(side.kl) for side in sides]),
    ]
    lines = [
        f"A: {comparison.a.name}",
        f"B: {comparison.b.name}",
        f"{amount(comparison.samples, 'sample')}, {amount(comparison.tokens, 'predicted token')}{intervals}",
        *comparison.notes,
        "",
        f"{'':16}  {'A':{_COLUMN}}  B",
        *(f"{label:16}  {cells[0]:{_COLUMN}}  {cells[1]}" for label, cells in rows),
        f"{'same likeliest':16}  {_shown(comparison.agreement, lambda share: f'{share:.2%}')} of tokens",
    ]
    if any(side.kl_outside > NOTED * side.kl.value for side in sides):
        parts = " and ".join(f"{side.kl_outside:.3g}" for side in sides)
        masses = " and ".join(f"{side.mass_outside:.2%}" for side in sides)
        lines.append(
            f"Of the KL, {parts} is estimated, from a sample of the tokens outside the likeliest ones, whose "
            f"probability is {masses}."
        )
    return "\n".join([*lines, "KL in nats a token: A's column is KL(A || B), B's is KL(B || A)."])


def _shown(figure: Figure, form: Callable[[float], str] = lambda value: f"{value:.4g}") -> str:
    if figure.low is None or figure.high is None:
        return form(figure.value)
    return f"{form(figure.value)} [{form(figure.low)}, {form(figure.high)}]"

"""`python -m phi4_mlx fuse`: merges an adapter into its base model, and reports how much of its effect is kept."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.advice import command_line
from phi4_mlx.terminal.amount import amount, size
from phi4_mlx.terminal.command import Parser, progress_bar, run, typed, word
from phi4_mlx.terminal.options import add_revision_option

if TYPE_CHECKING:
    from phi4_mlx.lora.fuse import Fused

_SHOWN = 8  # paths of matrices on a line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _fuse, argv)


def _parser() -> Parser:
    parser = Parser(typed("fuse"), "Merge an adapter into its base model, and write the result as a package.")
    add = parser.add_argument
    add("--model", type=word, required=True, help="the base: a folder, a Hugging Face id or an embedded model")
    add(
        "--adapter-path", type=word, default="adapters", metavar="FOLDER",
        help="the adapter, saved by training or by PEFT",
    )  # fmt: skip
    add("--save-path", type=word, default="fused_model", metavar="OUT", help="the new folder")
    add(
        "--dequantize", action="store_true",
        help="write unquantised weights; otherwise as the base, in more bits where the adapter would be lost",
    )  # fmt: skip
    add_revision_option(parser)
    return parser


def _fuse(args: argparse.Namespace) -> None:
    from phi4_mlx.lora.fuse import fuse  # here, so that --help and a mistyped option cost nothing

    begin = time.perf_counter()
    with progress_bar("fusing") as progress:
        fused = fuse(args.model, args.adapter_path, args.save_path, args.dequantize, args.revision, progress=progress)
    print(
        f"{args.save_path}: {size(fused.package_bytes)} of weights, the base has {size(fused.base_bytes)}; "
        f"{time.perf_counter() - begin:.1f} s"
    )
    print(
        f"{amount(len(fused.schemes), 'matrix', 'matrices')}: the adapter changes them by {fused.change:.2%} (relative "
        f"RMS); as stored, they are {fused.error:.2%} off"
    )
    for line in _bits(fused):
        print(line)
    effect = fused.effect
    own = f"{effect.own} of the data's prompts" if effect.own else "no prompt of the adapter's data, which is not here,"
    print(
        f"measured on {own} and {effect.prompts - effect.own} others: the adapter changes "
        f"{amount(effect.changed, 'answer')}; the package gives {effect.as_adapter} of these as the adapter does and "
        f"{effect.as_base} as the base does; {effect.kept:.1%} of the effect on probabilities is kept"
    )
    if not effect.keeps:
        raise RequestError(
            f"{args.save_path} is written, but does not keep the fine-tune (see above), though its fused matrices are "
            "not quantised; use the adapter with --adapter-path instead, or train it longer"
        )
    print(f"chat with it: {command_line('chat', model=args.save_path)}")


def _bits(fused: Fused) -> list[str]:
    """The bits of the fused matrices, a line for each kind, with the paths of those that the package stores in more."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for path, scheme in fused.schemes.items():
        kinds[f"in {scheme.bits} bits ({scheme.mode})" if scheme else "unquantised"].append(path)
    lines = []
    for kind, paths in kinds.items():
        raised = [path.removeprefix("model.") for path in paths if path in fused.raised]
        more = f" and {len(raised) - _SHOWN} more" if len(raised) > _SHOWN else ""
        names = f", more than in the base: {', '.join(raised[:_SHOWN])}{more}" if raised else ""
        lines.append(f"{amount(len(paths), 'matrix', 'matrices')} {kind}{names}")
    return lines

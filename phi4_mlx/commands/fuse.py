"""`python -m phi4_mlx fuse`: merges an adapter into its base model, and reports how much of its effect is kept."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from phi4_mlx.terminal.command import Parser, progress_bar, run, typed, word
from phi4_mlx.terminal.options import add_revision_option


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
    from phi4_mlx.lora.fuse_report import print_fused

    begin = time.perf_counter()
    with progress_bar("fusing") as progress:
        fused = fuse(args.model, args.adapter_path, args.save_path, args.dequantize, args.revision, progress=progress)
    print_fused(args.save_path, fused, time.perf_counter() - begin)

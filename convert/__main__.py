"""`python -m phi4_mlx.convert`: makes a package, for example in 4 bits, from a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from phi4_mlx.config.fields import QUANTIZATION_MODES
from phi4_mlx.files.dtypes import DTYPES, FLOATS
from phi4_mlx.terminal.advice import command_line
from phi4_mlx.terminal.amount import size
from phi4_mlx.terminal.command import Parser, number, progress_bar, run, text, typed
from phi4_mlx.terminal.options import add_revision_option


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code.
    """
    return run(_parser(), _work, argv)


def _parser() -> Parser:
    parser = Parser(typed("convert"), "Make an MLX package, for example in 4 bits, from a Hugging Face checkpoint.")
    add = parser.add_argument
    add("--hf-path", type=text, required=True, metavar="SRC", help="a folder, or a Hugging Face id")
    add("--mlx-path", type=text, default="mlx_model", metavar="OUT", help="the new folder")
    add("-q", "--quantize", action="store_true", help="quantise the matrices")
    add("--q-bits", type=number(int, 2, 8), metavar="N", help="bits per number (default: 4, or the mode's)")
    add(
        "--q-group-size", type=number(int, 16, 128), metavar="N",
        help="numbers that share a scale (default: 64, or the mode's)",
    )  # fmt: skip
    add("--q-mode", choices=list(QUANTIZATION_MODES), help="format of the quantised numbers (default: affine)")
    add(
        "--embed-bits", type=number(int, 2, 8), metavar="N",
        help="bits per number of the embedding and the head, one matrix in Phi-4-mini (default: as --q-bits)",
    )  # fmt: skip
    add(
        "--q-calibration", type=text, metavar="FILE",
        help="round the matrices for what they do on these texts, in a format of training, or on 'default' ones; "
        "without --q-bits, each matrix gets the bits that cost least",
    )  # fmt: skip
    add(
        "--q-bpw", type=number(float, 2, 16), metavar="X",
        help="bits per number that all matrices may take together with their scales (default: as plain 4-bit ones, 4.5 "
        "in groups of 64)",
    )  # fmt: skip
    for name, what in (("tower", "towers for pictures and sound"), ("adapter", "LoRAs of a multimodal model")):
        add(
            f"--{name}-bits", type=number(int, 2, 16), metavar="N",
            help=f"bits per number of the {what} (default: 8, half the size of 16 with an error of 0.5 %%; 16 keeps "
            "them as they are)",
        )  # fmt: skip
    add(
        "--dtype", choices=[DTYPES[name].mlx_name for name in FLOATS],
        help="dtype of the numbers that are not quantised (default: unchanged)",
    )  # fmt: skip
    add("-d", "--dequantize", action="store_true", help="dequantise a quantised checkpoint; with -q, quantise it again")
    add_revision_option(parser, "hf_path")
    return parser


def _work(args: argparse.Namespace) -> None:
    from phi4_mlx.checkpoint import load_config

    from .package import convert  # late: --help and a mistyped option do not load mlx

    begin = time.perf_counter()
    options = {key: value for key, value in vars(args).items() if key != "debug"}
    with progress_bar("converting") as progress:
        convert(**options, progress=progress)
    out = Path(os.path.expanduser(args.mlx_path))
    nbytes = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    print(f"{args.mlx_path}: {size(nbytes)} of weights, {time.perf_counter() - begin:.1f} s")
    config = load_config(out)
    if config.context_note:
        print(f"context: {config.max_position_embeddings:,} tokens{config.context_note}")
    print(f"chat with it: {command_line('chat', model=args.mlx_path)}")


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m phi4_mlx.convert`: makes a package, for example in 4 bits, from a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from phi4_mlx.config.fields import QUANTIZATION_MODES
from phi4_mlx.files.dtypes import DTYPES, FLOATS
from phi4_mlx.terminal.advice import command_line
from phi4_mlx.terminal.amount import size
from phi4_mlx.terminal.command import Parser, number, progress_bar, run, text, typed
from phi4_mlx.terminal.options import add_revision_option

from .quantize import LEAST_BPW, MOST_BPW


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
        help="round the matrices so that their outputs on these texts change least: a file in a format of training, or "
        "'default' for the texts that come with the package; without --q-bits, choose the bits of each matrix too "
        "(default: none)",
    )  # fmt: skip
    add(
        "--q-bpw", type=number(float, LEAST_BPW, MOST_BPW), metavar="X",
        help="budget of --q-calibration: bits per number of all matrices together, scales included (default: those of "
        "plain 4 bits, 4.5 in groups of 64)",
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
        convert(**options, progress=progress, tell=partial(print, file=sys.stderr, flush=True))
    out = Path(os.path.expanduser(args.mlx_path))
    nbytes = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    print(f"{args.mlx_path}: {size(nbytes)} of weights, {time.perf_counter() - begin:.1f} s")
    if args.q_calibration is not None:
        print(_described(out))
    config = load_config(out)
    if config.context_note:
        print(f"context: {config.max_position_embeddings:,} tokens{config.context_note}")
    print(f"chat with it: {command_line('chat', model=args.mlx_path)}")


def _described(out: Path) -> str:
    """A line on the calibration of a package."""
    from phi4_mlx.files.json_file import read_json
    from phi4_mlx.files.manifest import REPORT_FILE

    from .report import PICTURE_FILE

    report = read_json(out / REPORT_FILE)
    kl = report["kl_nats_per_token"]["measured"]
    found = f"{report['bits_per_weight']:.2f} bits per weight, KL {kl:.5f} nats per token; more in {REPORT_FILE}"
    if (out / PICTURE_FILE).exists():
        return f"{found} and {PICTURE_FILE}"
    return f"{found}; no picture without matplotlib: {sys.executable} -m pip install 'matplotlib>=3.8'"


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m phi4_mlx fuse`: merges an adapter into its base model, and reports the loss of precision."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from phi4_mlx.terminal.command import Parser, progress_bar, run, word


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _fuse, argv)


def _parser() -> Parser:
    parser = Parser("phi4-mlx fuse", "Merge an adapter into its base model, and write the result as a package.")
    add = parser.add_argument
    add("--model", type=word, required=True, help="the base: a folder, a Hugging Face id, or demo")
    add(
        "--adapter-path", type=word, default="adapters", metavar="FOLDER",
        help="the adapter, saved by training or by PEFT (default: %(default)s)",
    )  # fmt: skip
    add("--save-path", type=word, default="fused_model", metavar="OUT", help="the new folder (default: %(default)s)")
    add("--dequantize", action="store_true", help="write unquantised weights (default: as the base is)")
    add("--revision", type=word, help="branch, tag or commit of the Hugging Face id")
    return parser


def _fuse(args: argparse.Namespace) -> None:
    from phi4_mlx.lora.fuse import fuse  # here, so that --help and a mistyped option cost nothing

    begin = time.perf_counter()
    with progress_bar("fusing") as progress:
        fused = fuse(args.model, args.adapter_path, args.save_path, args.dequantize, args.revision, progress=progress)
    size = sum(path.stat().st_size for path in Path(os.path.expanduser(args.save_path)).glob("*.safetensors"))
    print(f"{args.save_path}: {size:,} bytes of weights, {time.perf_counter() - begin:.1f} s")
    print(
        f"{fused.tensors} matrices: the adapter changes them by {fused.change:.2%} (relative RMS); "
        f"as stored, they are {fused.error:.2%} off"
    )
    print(
        f"logits on {fused.prompt_tokens} tokens, compared with base and adapter: {fused.max_difference:.3g} off "
        f"at most, {fused.mean_difference:.3g} on average; the likeliest token is the same at {fused.agreeing}"
    )

"""`python -m phi4_mlx doctor`: proves the fast paths on this machine, and names those to switch off."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from phi4_mlx.terminal.command import OUR_MISTAKE, Parser, run, typed, word


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 if a check fails."""
    return run(_parser(), _doctor, argv)


def _parser() -> Parser:
    parser = Parser(
        prog=typed("doctor"),
        description="Check this machine in under a minute: versions, memory and what fits; the GPU against the CPU; "
        "each fast path against its slow twin; speed.",
    )
    parser.add_argument(
        "--model", type=word, metavar="MODEL",
        help="a folder or a Hugging Face id to check beside the embedded models (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print one line of JSON to attach to a report, without paths or names"
    )
    return parser


def _doctor(args: argparse.Namespace) -> None:
    from phi4_mlx.doctor.examination import examine
    from phi4_mlx.hub import resolve

    folder = None if args.model is None else resolve(args.model)
    show = not args.json or sys.stderr.isatty()

    def tell(line: str) -> None:
        if show:
            print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    report = examine(folder, tell)
    print(json.dumps(report, allow_nan=False) if args.json else report["verdict"])
    if not report["passed"]:
        raise SystemExit(OUR_MISTAKE)

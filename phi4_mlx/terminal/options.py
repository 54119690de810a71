"""phi4_mlx.terminal.options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.command import Parser, number, word

MAX_TOKENS_LIMIT = 1_000_000

TEMPERATURE_LIMIT = 100.0

SEED_LIMIT = 2**64 - 1  # mlx seeds its generator with 64 bits

SAMPLING: dict[str, tuple[Callable[[str], int | float], int | float | None, str]] = {
    "temp": (number(float, 0.0, TEMPERATURE_LIMIT), 0.0, "temperature; 0 takes the likeliest token"),
    "top-p": (number(float, 0.0, 1.0), 1.0, "keep the likeliest tokens that come to this probability"),
    "min-p": (number(float, 0.0, 1.0), 0.0, "keep tokens this likely, relative to the likeliest"),
    "top-k": (number(int, 0, 2**31 - 1), 0, "keep this many of the likeliest tokens; 0 keeps all"),
    "max-tokens": (number(int, 1, MAX_TOKENS_LIMIT), None, "longest answer, in tokens"),
    "seed": (number(int, 0, SEED_LIMIT), None, "makes sampling repeatable"),
    "repetition-penalty": (number(float, 0.01, 100.0), None, "over 1: makes the last 20 tokens less likely"),
    "presence-penalty": (number(float, -100.0, 100.0), None, "subtracted from the logits of the last 20 tokens"),
    "frequency-penalty": (number(float, -100.0, 100.0), None, "the same, once for each time that a token occurs"),
}
"""The sampling options: type, default, help. `/set` in the chat knows the same ones."""

LONG_PREFILL = 512  # tokens; a prefill longer than this tells how far it is


def add_model_options(parser: Parser) -> None:
    """Adds the options that say which model, and how it is read."""
    parser.add_argument(
        "--model",
        type=word,
        help="a folder, a Hugging Face id, or demo, the model that comes along (default: Phi-4-mini-instruct, 4 bits)",
    )
    parser.add_argument("--adapter-path", type=word, metavar="FOLDER", help="a LoRA adapter to put on the model")
    parser.add_argument("--revision", type=word, help="branch, tag or commit of the Hugging Face id")
    parser.add_argument("--verify", action="store_true", help="check every file against the package's hashes")
    parser.add_argument("--chat-format", type=word, metavar="NAME", help="override the recognised chat format")


def add_kv_bits_option(parser: Parser) -> None:
    """Adds `--kv-bits`."""
    parser.add_argument(
        "--kv-bits", type=int, choices=(4, 8), help="keep keys and values in so many bits: less memory, not quite exact"
    )


def add_decoding_options(parser: Parser) -> None:
    """Adds the options that say what is remembered of a text, and how tokens are guessed ahead."""
    add_kv_bits_option(parser)
    parser.add_argument(
        "--max-kv-size",
        type=number(int, 512, 2**31 - 1),
        metavar="N",
        help="remember at most N tokens: the first 4, and the latest; what lies between is forgotten",
    )
    parser.add_argument(
        "--speculate",
        choices=("auto", "off", "lookup"),
        default="auto",
        help="guess tokens from what the text repeats: where it pays, never, or wherever it may (default: %(default)s)",
    )
    parser.add_argument("--draft-model", type=word, metavar="MODEL", help="guess them with this smaller model instead")


def check_decoding_options(args: argparse.Namespace) -> None:
    """Sees to it that no option leaves another one nothing to do.

    Raises:
        RequestError: one does.
    """
    guesses = "--draft-model" if args.draft_model is not None else f"--speculate {args.speculate}"
    if args.draft_model is not None and args.speculate == "off":
        raise RequestError("--draft-model guesses tokens, and --speculate off forbids it; drop one")
    if args.max_kv_size is not None and guesses in ("--draft-model", "--speculate lookup"):
        raise RequestError(f"{guesses} may have to take tokens back, which --max-kv-size forgets; drop one")


def cache_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `make_cache` takes for the options."""
    return {"kv_bits": args.kv_bits, "max_kv_size": args.max_kv_size}


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `load` takes for the options of `add_model_options`, besides the model's name."""
    return {name: getattr(args, name) for name in ("adapter_path", "revision", "verify", "chat_format")}


def add_sampling_options(parser: Parser, max_tokens: int) -> None:
    """Adds the options of `SAMPLING`."""
    for name, (kind, default, explanation) in SAMPLING.items():
        value = max_tokens if name == "max-tokens" else default
        shown = "" if value is None else " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=value, metavar="N", help=explanation + shown)

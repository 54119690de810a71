"""The options of `python -m phi4_mlx.server` that no other command has."""

from __future__ import annotations

from phi4_mlx.terminal.command import Parser, number, word
from phi4_mlx.terminal.limits import MAX_TOKENS_LIMIT
from phi4_mlx.terminal.options import (
    add_kv_bits_option,
    add_overflow_option,
    add_prompt_cache_options,
    add_speculation_options,
    advised_text,
)

KEY_VARIABLE = "PHI4_MLX_API_KEY"
LOG_LEVELS = (
    "info: a line for each request, but for polls and the page's files; warning: for each that fails; error: for each "
    "that the server fails; no line contains a prompt, an answer or a key"
)


def add_access_options(parser: Parser) -> None:
    """Adds the options that say who may send requests."""
    parser.add_argument("--host", type=word, default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=number(int, 0, 65535), default=8080, help="0 takes a free port")
    parser.add_argument(
        "--api-key",
        type=word,
        metavar="KEY",
        help=f"key that clients must send; {KEY_VARIABLE} sets it too, out of sight of `ps` (default: none)",
    )
    parser.add_argument(
        "--allowed-origins",
        type=word,
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web pages that may send requests; * is any",
    )


def add_limit_options(parser: Parser) -> None:
    """Adds the options that limit lengths, numbers, times and bytes."""
    parser.add_argument(
        "--max-tokens",
        type=number(int, 1, MAX_TOKENS_LIMIT),
        help=f"longest answer where a client sets no limit (default: as long as fits{advised_text('max-tokens')})",
    )
    add_overflow_option(parser)
    parser.add_argument(
        "--decode-concurrency", type=number(int, 1, 1024), default=32, metavar="N", help="answers generated at a time"
    )
    parser.add_argument(
        "--max-queue",
        type=number(int, 0, 100_000),
        default=256,
        metavar="N",
        help="requests that may wait",
    )
    parser.add_argument(
        "--timeout",
        type=number(float, 1.0, 86_400.0),
        default=600.0,
        metavar="S",
        help="seconds for an answer",
    )
    parser.add_argument(
        "--kv-cache-bytes", type=number(int, 2**20, 2**50), metavar="N",
        help="bytes for running answers (default: half of the memory beside the weights)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-cache-bytes", type=number(int, 0, 2**50), metavar="N",
        help="bytes for earlier prompts (default: a quarter of the memory beside the weights)",
    )  # fmt: skip
    add_prompt_cache_options(parser)


def add_decoding_options(parser: Parser) -> None:
    """Adds the options of the cache, of speculative decoding and of latency."""
    add_kv_bits_option(parser)
    add_speculation_options(parser)
    parser.add_argument(
        "--max-step-ms", type=number(float, 1.0, 60_000.0), metavar="N",
        help="milliseconds that a step may take while answers run: prompts are read in smaller chunks where needed, of "
        "16 tokens at least (default: chunks of 512 tokens)",
    )  # fmt: skip


def add_log_option(parser: Parser) -> None:
    """Adds `--log-level`."""
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info", help=LOG_LEVELS)

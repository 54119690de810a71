"""Options that several commands share; `SAMPLING` is the one table of the sampling options and their defaults.

Imports only the standard library, so that `--help` and a mistyped option cost nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import NamedTuple, TypedDict

from phi4_mlx.errors import RequestError
from phi4_mlx.files.embedded import EMBEDDED
from phi4_mlx.terminal.command import Idle, Parser, complain, idle_options, number, word
from phi4_mlx.terminal.limits import (
    MAX_TOKENS_LIMIT,
    PENALTY_RANGE,
    REPETITION_PENALTY_RANGE,
    SEED_LIMIT,
    TEMPERATURE_LIMIT,
    TOP_K_LIMIT,
)

LONG_PREFILL = 512  # tokens; a longer prefill shows its progress


class SamplingOption(NamedTuple):
    """A sampling option: the parser of its value, its default and its help text."""

    parse: Callable[[str], int | float]
    default: int | float | None
    explanation: str


# The command line takes them with two dashes before the name, the chat's /set without.
SAMPLING = {
    "temp": SamplingOption(number(float, 0, TEMPERATURE_LIMIT), 0.0, "temperature; 0 takes the likeliest token"),
    "top-p": SamplingOption(number(float, 0, 1), 1.0, "keep the likeliest tokens whose probabilities sum to this"),
    "min-p": SamplingOption(number(float, 0, 1), 0.0, "keep tokens at least this likely, relative to the likeliest"),
    "top-k": SamplingOption(number(int, 0, TOP_K_LIMIT), 0, "keep this many of the likeliest tokens; 0 keeps all"),
    "max-tokens": SamplingOption(number(int, 1, MAX_TOKENS_LIMIT), None, "longest answer, in tokens"),
    "seed": SamplingOption(number(int, 0, SEED_LIMIT), None, "makes sampling repeatable (default: a new one)"),
    "repetition-penalty": SamplingOption(
        number(float, *REPETITION_PENALTY_RANGE), None,
        "above 1: makes the last 20 tokens less likely; 1 has no effect (default: none)",
    ),
    "presence-penalty": SamplingOption(
        number(float, *PENALTY_RANGE),
        None,
        "subtracted from the logit of every token among the last 20 (default: none)",
    ),
    "frequency-penalty": SamplingOption(
        number(float, *PENALTY_RANGE), None,
        "subtracted from a token's logit each time it is among the last 20 (default: none)",
    ),
}


# Chat format -> the sampling that the model's authors advise, in place of the defaults above. Greedy decoding makes a
# reasoning model repeat itself. Source: ArchScale's eval_reason (flash); Phi-4-mini-reasoning's model card.
ADVISED: dict[str, dict[str, int | float]] = {
    "phi4-mini-flash-reasoning": {"temp": 0.6, "top-p": 0.95, "max-tokens": 32_768},
    "phi4-mini-reasoning": {"temp": 0.8, "top-p": 0.95, "max-tokens": 32_768},
}

Settings = dict[str, int | float | None]  # the names of `SAMPLING` -> values


def _is_greedy(args: argparse.Namespace) -> bool:
    """True if the answer is greedy whatever is loaded: at --temp 0, or by default with the default model."""
    return args.temp == 0 or (args.temp is None and args.model is None and args.chat_format is None)


def _cuts(args: argparse.Namespace) -> bool:
    """True if an option removes unlikely tokens from the draw."""
    return args.top_p not in (None, 1) or bool(args.min_p or args.top_k)


_NO_CUTS = Idle(
    ("top_p", "min_p", "top_k"),
    lambda args: _is_greedy(args) and _cuts(args),
    "at --temp 0, which takes the likeliest token",
)


class LoadArguments(TypedDict, total=False):
    """The keyword arguments of `phi4_mlx.load` that `add_model_options` covers."""

    adapter_path: str | None
    revision: str | None
    verify: bool
    chat_format: str | None


class CacheArguments(TypedDict):
    """The keyword arguments of `make_cache` that `add_decoding_options` covers."""

    kv_bits: int | None
    max_kv_size: int | None


def add_model_options(parser: Parser) -> None:
    """Adds the options that select a model and the way it is loaded."""
    parser.add_argument(
        "--model",
        type=word,
        help="a folder, a Hugging Face id, or demo, demo-flash or demo-multimodal for an embedded model "
        "(default: mlx-community/Phi-4-mini-instruct-4bit)",
    )
    parser.add_argument(
        "--adapter-path", type=word, metavar="FOLDER", help="a LoRA adapter to apply to the model (default: none)"
    )
    add_revision_option(parser)
    parser.add_argument("--verify", action="store_true", help="check every file against the hashes of the package")
    parser.add_argument(
        "--chat-format", type=word, metavar="NAME", help="chat format of the prompt (default: the one detected)"
    )


def add_parallel_option(parser: Parser) -> None:
    """Adds `--parallel`."""
    parser.add_argument(
        "--parallel",
        choices=("tensor", "pipeline"),
        help="how the ranks that mlx.launch has started hold the model: tensor splits every matrix, for speed over a "
        "fast link; pipeline deals out the blocks, for memory over any link (default: chosen, with the reason)",
    )


def add_revision_option(parser: Parser, model: str = "model") -> None:
    """Adds `--revision`, of the name in the option `model`."""

    def is_local(args: argparse.Namespace) -> bool:
        name = getattr(args, model) or ""
        return name in EMBEDDED or os.path.isdir(os.path.expanduser(name))

    parser.add_argument(
        "--revision",
        type=word,
        help="branch, tag or commit of the Hugging Face id (default: main; of the default model, a pinned commit)",
    )
    why = "on a folder or an embedded model; it selects a version of a Hugging Face id"
    parser.idle.append(Idle(("revision",), is_local, why))


def load_options(args: argparse.Namespace) -> LoadArguments:
    """The keyword arguments of `load` from the options of `add_model_options`, without the model's name."""
    return LoadArguments(
        adapter_path=args.adapter_path, revision=args.revision, verify=args.verify, chat_format=args.chat_format
    )


def add_sampling_options(parser: Parser, max_tokens: int) -> None:
    """Adds the options of `SAMPLING`; `max_tokens` is the command's own default for `--max-tokens`.

    An option that is not given is None: its default depends on the model, see `sampling_defaults`.
    """
    for name, option in SAMPLING.items():
        default = max_tokens if name == "max-tokens" else option.default
        shown = "" if default is None else f" (default: {default:g}{advised_text(name)})"
        parser.add_argument(f"--{name}", type=option.parse, metavar="N", help=f"{option.explanation}{shown}")
    # The seed is not among them: at --temp 0 an answer is repeatable, as it asks.
    parser.idle.append(_NO_CUTS)


def sampling_defaults(chat_format: str, max_tokens: int | None) -> Settings:
    """The default of each option of `SAMPLING` for a model.

    Args:
        chat_format: the name of the model's chat format.
        max_tokens: the longest answer, in tokens, where the model's authors advise none; None for no limit.
    """
    own = {name: option.default for name, option in SAMPLING.items()}
    return own | {"max-tokens": max_tokens} | advised(chat_format)


def advised(chat_format: str) -> dict[str, int | float]:
    """The settings of `SAMPLING` that the authors of a model advise; empty for most models."""
    return ADVISED.get(chat_format, {})


def advised_text(name: str) -> str:
    """The advised values of an option of `SAMPLING`, to follow its default in a help text."""
    return "".join(f"; {each[name]:g} for {known}" for known, each in ADVISED.items() if name in each)


def given_sampling(args: argparse.Namespace) -> Settings:
    """The options of `add_sampling_options` that were given."""
    values = {name: getattr(args, name.replace("-", "_")) for name in SAMPLING}
    return {name: value for name, value in values.items() if value is not None}


def complain_of_cuts(prog: str, args: argparse.Namespace, temp: object) -> None:
    """Warns of options without effect at a model's default temperature, which the parser did not know.

    Args:
        prog: the command, which starts the line.
        args: the parsed options.
        temp: the temperature of the answers.
    """
    if temp == 0 and not _is_greedy(args):
        names = {name.replace("-", "_") for name in given_sampling(args)}
        for line in idle_options([_NO_CUTS], names, argparse.Namespace(**vars(args) | {"temp": temp})):
            complain(prog, line)


def add_kv_bits_option(parser: Parser) -> None:
    """Adds `--kv-bits`."""
    parser.add_argument(
        "--kv-bits",
        type=lambda given: int(given) if given in ("4", "8") else given,  # others are refused as no choice
        choices=(4, 8),
        help="quantise cached keys and values to this many bits: less memory, slightly inexact (default: not "
        "quantised)",
    )


def add_decoding_options(parser: Parser) -> None:
    """Adds the options of the cache and of speculative decoding."""
    add_kv_bits_option(parser)
    parser.add_argument(
        "--max-kv-size",
        type=number(int, 512, 2**31 - 1),
        metavar="N",
        help="cache at most N tokens: the first 4 and the latest; those between are dropped (default: all)",
    )
    add_speculation_options(parser)


def add_speculation_options(parser: Parser) -> None:
    """Adds `--speculate` and `--draft-model`."""
    parser.add_argument(
        "--speculate",
        choices=("auto", "off", "lookup"),
        default="auto",
        help="guess tokens from repetitions in the text: where it pays, never, or wherever possible",
    )
    parser.add_argument(
        "--draft-model", type=word, metavar="MODEL", help="guess tokens with this smaller model instead (default: none)"
    )


def add_media_options(parser: Parser, text: str) -> None:
    """Adds `--image` and `--audio`, whose files come before `text`."""
    parser.add_argument(
        "--image", type=word, action="append", default=[], metavar="FILE",
        help=f"a picture before {text}, or a PDF, whose pages are pictures, as in 'scan.pdf 1-3'; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--audio", type=word, action="append", default=[], metavar="FILE",
        help=f"a sound before {text}; may be repeated",
    )  # fmt: skip


def add_tool_options(parser: Parser, purpose: str) -> None:
    """Adds `--tools` and `--mcp`; `purpose` completes "a file whose public functions ..."."""
    parser.add_argument(
        "--tools", type=word, action="append", default=[], metavar="FILE.py",
        help=f"a file whose public functions {purpose}; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--mcp", type=word, action="append", default=[], metavar="COMMAND",
        help=f"an MCP server to start, whose tools {purpose}; may be repeated; needs the package mcp",
    )  # fmt: skip


def add_overflow_option(parser: Parser) -> None:
    """Adds `--context-overflow`."""
    parser.add_argument(
        "--context-overflow",
        choices=("stop", "oldest"),
        default="stop",
        help="where a conversation no longer fits the context: stop refuses the question; oldest leaves out the oldest "
        "turns, several at a time, and keeps the system prompt, the tools and room for an answer of --max-tokens, at "
        "most half of the context (a quarter where there is no limit). An answer itself ends where the context does",
    )


def add_prompt_cache_options(parser: Parser) -> None:
    """Adds `--prompt-cache-dir` and `--prompt-cache-disk-bytes`."""
    parser.add_argument(
        "--prompt-cache-dir", type=word, metavar="DIR",
        help="folder that keeps the caches of earlier prompts for the next start; only its owner may read it "
        "(default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-cache-disk-bytes", type=number(int, 2**20, 2**50), default=10 * 2**30, metavar="N",
        help="most bytes in that folder; the least recently used goes first",
    )  # fmt: skip
    no_folder = "without --prompt-cache-dir, whose files it limits"
    parser.idle.append(Idle(("prompt_cache_disk_bytes",), lambda args: args.prompt_cache_dir is None, no_folder))


def check_decoding_options(args: argparse.Namespace) -> None:
    """Checks that no decoding option cancels another.

    Raises:
        RequestError: an option would have no effect; names both.
    """
    check_speculation_options(args)
    guesses = "--draft-model" if args.draft_model is not None else f"--speculate {args.speculate}"
    if args.max_kv_size is not None and guesses in ("--draft-model", "--speculate lookup"):
        raise RequestError(f"{guesses} may have to take tokens back, and --max-kv-size makes that impossible; drop one")


def check_speculation_options(args: argparse.Namespace) -> None:
    """Checks that a draft model may guess.

    Raises:
        RequestError: it may not; names both options.
    """
    if args.draft_model is not None and args.speculate == "off":
        raise RequestError("--draft-model guesses tokens, and --speculate off forbids it; drop one")


def cache_options(args: argparse.Namespace) -> CacheArguments:
    """The keyword arguments of `make_cache` from the options of `add_decoding_options`."""
    return CacheArguments(kv_bits=args.kv_bits, max_kv_size=args.max_kv_size)

"""`python -m phi4_mlx cache-prompt`: prefills a text once and writes its prompt cache to a file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from phi4_mlx.commands.prompt import prompt_messages, read_media, read_prompt, show_progress
from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.amount import amount, size
from phi4_mlx.terminal.command import Parser, run, text, typed, word
from phi4_mlx.terminal.options import add_kv_bits_option, add_media_options, add_model_options, load_options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _cache, argv)


def _parser() -> Parser:
    parser = Parser(
        prog=typed("cache-prompt"),
        description="Prefill a long text once, for many prompts. `generate --prompt-cache-file FILE` then answers as "
        "if its prompt were the text, an empty line and the prompt, and prefills only the latter.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--prompt", "-p", type=text,
        help="the text, which begins the user's turn; text on standard input follows it, after an empty line; - reads "
        "that alone (default: -)",
    )  # fmt: skip
    add_media_options(parser, "the text")
    parser.add_argument("--system-prompt", type=text, help="instructions to the model, before the text (default: none)")
    add_kv_bits_option(parser)
    parser.add_argument("--prompt-cache-file", type=word, required=True, metavar="FILE", help="the file to write")
    return parser


def _cache(args: argparse.Namespace) -> None:
    file = Path(os.path.expanduser(args.prompt_cache_file)).absolute()
    if (file.exists() and not file.is_file()) or not file.parent.is_dir():  # checked before a long prefill
        raise RequestError(f"{file} cannot be written; name a file in a folder that exists")
    prompt = read_prompt(args)

    from phi4_mlx.checkpoint import load
    from phi4_mlx.generation.memory import check_context, plan_context
    from phi4_mlx.generation.prompt_cache_file import save_prompt_cache
    from phi4_mlx.generation.steps import generate_step
    from phi4_mlx.hub import DEFAULT_MODEL

    model, tokenizer = load(args.model or DEFAULT_MODEL, **load_options(args), lazy=True)
    cache = model.make_cache(kv_bits=args.kv_bits)
    messages = prompt_messages("", args.system_prompt, prompt, read_media(args, tokenizer))
    ids = tokenizer.chat_format.render_open(tokenizer, messages)  # all prompts after the text begin with it
    check_context(plan_context(model, args.kv_bits), len(ids))
    next(generate_step(ids, model, max_tokens=1, cache=cache, prompt_progress_callback=show_progress))  # prefills
    metadata = {"text": prompt}
    if args.system_prompt is not None:
        metadata["system_prompt"] = args.system_prompt
    nbytes = save_prompt_cache(file, cache, model, tokenizer, metadata)
    print(f"{args.prompt_cache_file}: {amount(cache.offset, 'token')}, {size(nbytes)}")

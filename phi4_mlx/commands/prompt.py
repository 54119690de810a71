"""The prompt of `generate` and `cache-prompt`: read, put into messages, and its prefill's progress shown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.command import read_standard_input, standard_input_beside
from phi4_mlx.terminal.options import LONG_PREFILL

if TYPE_CHECKING:
    from phi4_mlx.tokens.prompt import Medium
    from phi4_mlx.tokens.tokenizer import Tokenizer


def read_prompt(args: argparse.Namespace) -> str:
    """Reads the prompt from `--prompt`, from standard input, or from both, with an empty line between them.

    With `--image` or `--audio` on a terminal there need not be one: a question may be spoken.

    Raises:
        RequestError: there is no prompt, or it is blank or not UTF-8.
    """
    if args.prompt is None and has_media(args) and sys.stdin.isatty():
        return ""
    if args.prompt in (None, "-"):
        if args.prompt is None and sys.stdin.isatty():
            raise RequestError("there is no prompt; give one with --prompt or through a pipe")
        prompt = read_standard_input().removesuffix("\n")
    else:
        prompt = standard_input_beside(args.prompt)
    if not prompt.strip() and not has_media(args):
        raise RequestError("the prompt is empty; it needs at least one character that is not white space")
    return prompt


def has_media(args: argparse.Namespace) -> bool:
    """True if `--image` or `--audio` was given."""
    return bool(args.image or args.audio)


def read_media(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Medium]:
    """Reads the files of `--image` and `--audio`; on a terminal, a line of standard error says what each costs.

    Args:
        args: the options.
        tokenizer: of the model.

    Returns:
        The media, in the order of the options, pictures first.

    Raises:
        RequestError: the model reads only text, or a file cannot be read.
    """
    if not has_media(args):
        return []
    from phi4_mlx.hub import DEFAULT_MODEL
    from phi4_mlx.tokens.media.media_file import check_reads_media, media_of_file

    check_reads_media(tokenizer, args.model or DEFAULT_MODEL)

    def tell(price: str) -> None:
        if sys.stderr.isatty():
            print(price, file=sys.stderr)

    found = [each for path in args.image for each in media_of_file(path, "image", tokenizer, tell)]
    found += [each for path in args.audio for each in media_of_file(path, "audio", tokenizer, tell)]
    return [each.medium for each in found if each.medium is not None]


def prompt_messages(
    prompt: str, system_prompt: str | None, text: str | None = None, media: Sequence[Medium] = ()
) -> list[dict[str, Any]]:
    """The messages of a prompt.

    Args:
        prompt: the user's message, or its end.
        system_prompt: the system message, or None.
        text: the beginning of the user's message, before an empty line and the prompt; None for none.
        media: the pictures and sounds before the text.
    """
    content = prompt if text is None else f"{text}\n\n{prompt}"
    parts = [{"type": each.kind, each.kind: each} for each in media]
    question = {"role": "user", "content": [*parts, {"type": "text", "text": content}] if media else content}
    return [question] if system_prompt is None else [{"role": "system", "content": system_prompt}, question]


def show_progress(done: int, total: int) -> None:
    """Shows the progress of a long prefill, in tokens, on a line of standard error that the next call replaces."""
    if total > LONG_PREFILL and sys.stderr.isatty():
        sys.stderr.write(f"\rreading {done:,} of {total:,} tokens ..." if done < total else f"\r{' ' * 60}\r")
        sys.stderr.flush()

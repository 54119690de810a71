"""The prompt of `generate` and `cache-prompt`: read, put into messages, and its prefill's progress shown."""

from __future__ import annotations

import argparse
import sys

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.command import read_standard_input, standard_input_beside
from phi4_mlx.terminal.options import LONG_PREFILL


def read_prompt(args: argparse.Namespace) -> str:
    """Reads the prompt from `--prompt`, from standard input, or from both, with an empty line between them.

    Raises:
        RequestError: there is no prompt, or it is blank or not UTF-8.
    """
    if args.prompt in (None, "-"):
        if args.prompt is None and sys.stdin.isatty():
            raise RequestError("there is no prompt; give one with --prompt or through a pipe")
        prompt = read_standard_input().removesuffix("\n")
    else:
        prompt = standard_input_beside(args.prompt)
    if not prompt.strip():
        raise RequestError("the prompt is empty; it needs at least one character that is not white space")
    return prompt


def prompt_messages(prompt: str, system_prompt: str | None, text: str | None = None) -> list[dict[str, str]]:
    """The messages of a prompt.

    Args:
        prompt: the user's message, or its end.
        system_prompt: the system message, or None.
        text: the beginning of the user's message, before an empty line and the prompt; None for none.
    """
    question = {"role": "user", "content": prompt if text is None else f"{text}\n\n{prompt}"}
    return [question] if system_prompt is None else [{"role": "system", "content": system_prompt}, question]


def show_progress(done: int, total: int) -> None:
    """Shows the progress of a long prefill, in tokens, on a line of standard error that the next call replaces."""
    if total > LONG_PREFILL and sys.stderr.isatty():
        sys.stderr.write(f"\rreading {done:,} of {total:,} tokens ..." if done < total else f"\r{' ' * 60}\r")
        sys.stderr.flush()

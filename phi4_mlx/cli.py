"""`python -m phi4_mlx COMMAND`, also installed as `phi4-mlx`: finds the command and imports it, and no other."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from phi4_mlx.terminal.command import USER_MISTAKE, complain

COMMANDS = {
    "generate": ("phi4_mlx.commands.generate", "print the answer to one prompt"),
    "cache-prompt": ("phi4_mlx.commands.cache_prompt", "prefill a long text once, for many prompts of generate"),
    "chat": ("phi4_mlx.chat.__main__", "talk with a model in the terminal"),
    "server": ("phi4_mlx.server.__main__", "serve a model over HTTP: OpenAI's and Anthropic's APIs, and a chat page"),
    "bridge": ("phi4_mlx.bridge.__main__", "serve another program over standard input and output"),
    "context": ("phi4_mlx.commands.context", "what contexts of a model cost in memory, and what this machine allows"),
    "lora": ("phi4_mlx.lora.__main__", "fine-tune a model on your own data"),
    "convert": ("phi4_mlx.convert.__main__", "make a package, 4-bit say, from a Hugging Face checkpoint"),
    "benchmark": ("phi4_mlx.commands.benchmark", "measure how fast a model is on this machine"),
    "fuse": ("phi4_mlx.commands.fuse", "make a package of a model and an adapter"),
}
PROG = "phi4-mlx"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names; the words after it are the command's own.

    Args:
        argv: the words after the program's name; those of the process if None.

    Returns:
        The exit code.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"phi4-mlx {_version()}")
        return 0
    if name not in COMMANDS:
        complain(PROG, f"{name!r} is not a command; the commands are {', '.join(COMMANDS)}; see --help")
        return USER_MISTAKE
    module, _ = COMMANDS[name]
    return importlib.import_module(module).main(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [options]",
            "",
            "The Phi-4-mini family on Apple MLX.",
            "",
            *lines,
            "",
            f"{PROG} COMMAND --help lists the options of one; {PROG} --version tells the version.",
        ]
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("phi4-mlx")
    except PackageNotFoundError:
        return "(run from a checkout that is not installed)"

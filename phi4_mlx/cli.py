"""`python -m phi4_mlx COMMAND`, also installed as `phi4-mlx`: imports only the module of that command and runs it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from phi4_mlx.terminal.command import USER_MISTAKE, complain
from phi4_mlx.terminal.version import version

COMMANDS = {
    "generate": ("phi4_mlx.commands.generate", "print the answer to one prompt"),
    "cache-prompt": ("phi4_mlx.commands.cache_prompt", "prefill a long text once, for many runs of generate"),
    "chat": ("phi4_mlx.chat.__main__", "chat with a model in the terminal"),
    "server": ("phi4_mlx.server.__main__", "serve a model over HTTP: OpenAI's and Anthropic's APIs, and a chat page"),
    "bridge": ("phi4_mlx.bridge.__main__", "serve another program over standard input and output"),
    "context": ("phi4_mlx.commands.context", "show the memory that a context takes, and what fits on this machine"),
    "lora": ("phi4_mlx.lora.__main__", "fine-tune a model on your own data"),
    "convert": ("phi4_mlx.convert.__main__", "convert a Hugging Face checkpoint to a package, such as a 4-bit one"),
    "benchmark": ("phi4_mlx.commands.benchmark", "measure the speed of a model on this machine"),
    "fuse": ("phi4_mlx.commands.fuse", "merge an adapter into a model and write the result as a package"),
}
PROG = "phi4-mlx"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command named by the first argument; the other arguments are the command's.

    Args:
        argv: arguments without the program's name; those of the process if None.

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
    command: Callable[[Sequence[str]], int] = importlib.import_module(module).main
    return command(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [options]",
            "",
            "The Phi-4-mini family on Apple MLX.",
            "",
            *lines,
            "",
            f"{PROG} COMMAND --help lists the options of a command; {PROG} --version prints the version.",
        ]
    )


def _version() -> str:
    return version() or "(run from a checkout that is not installed)"

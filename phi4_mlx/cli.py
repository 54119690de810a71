"""`python -m phi4_mlx COMMAND`, also installed as `phi4-mlx`: imports only the module of that command and runs it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.command import USER_MISTAKE, complain, typed
from phi4_mlx.terminal.suggestion import suggestion
from phi4_mlx.terminal.version import __version__

COMMANDS = {
    "generate": ("phi4_mlx.commands.generate", "print the answer to one prompt"),
    "transcribe": ("phi4_mlx.commands.transcribe", "write down the speech in sound files of any length"),
    "cache-prompt": ("phi4_mlx.commands.cache_prompt", "prefill a long text once, for many runs of generate"),
    "chat": ("phi4_mlx.chat.__main__", "chat with a model in the terminal"),
    "server": ("phi4_mlx.server.__main__", "serve a model over HTTP: OpenAI's and Anthropic's APIs, and a chat page"),
    "bridge": ("phi4_mlx.bridge.__main__", "serve another program over standard input and output"),
    "models": ("phi4_mlx.commands.models", "list, download and remove the models in the Hugging Face cache"),
    "context": ("phi4_mlx.commands.context", "show the memory that a context takes, and what fits on this machine"),
    "plan": ("phi4_mlx.commands.plan", "show what a model over several machines takes: bytes, exchanges and times"),
    "doctor": ("phi4_mlx.commands.doctor", "check this machine: memory, and each fast path against its slow twin"),
    "lora": ("phi4_mlx.lora.__main__", "fine-tune a model on your own data"),
    "convert": ("phi4_mlx.convert.__main__", "convert a Hugging Face checkpoint to a package, such as a 4-bit one"),
    "compare": ("phi4_mlx.commands.compare", "measure how far a model is from another, such as before quantising"),
    "benchmark": ("phi4_mlx.commands.benchmark", "measure the speed of a model on this machine"),
    "evaluate": ("phi4_mlx.commands.evaluate", "score a model on tasks, beside published figures and other runs"),
    "fuse": ("phi4_mlx.commands.fuse", "merge an adapter into a model and write the result as a package"),
    "export": ("phi4_mlx.lora.export", "write a model or an adapter for Ollama, vLLM, transformers or PEFT"),
    "lora.export": ("phi4_mlx.lora.export", "the same as export"),
}


OVER_RANKS = ("generate", "chat", "server", "lora", "evaluate", "plan")
"""The commands that several processes of one job may run together."""


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
        print(f"phi4-mlx {__version__}")
        return 0
    if name not in COMMANDS:
        known = f"; the commands are {', '.join(COMMANDS)}; see --help"
        complain(
            typed(""), f"{name!r:.100} is not a command{suggestion(name, [*COMMANDS, '--help', '--version']) or known}"
        )
        return USER_MISTAKE
    if rest and f"{name}.{rest[0]}" in COMMANDS:
        complain(typed(name), f"unrecognized arguments: {rest[0]}; did you mean {typed(f'{name}.{rest[0]}')}?")
        return USER_MISTAKE
    if name not in OVER_RANKS and {"MLX_RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys() and _refuses_ranks(name):
        return USER_MISTAKE
    module, _ = COMMANDS[name]
    command: Callable[..., int] = importlib.import_module(module).main
    return command(rest, name) if name == "export" else command(rest)  # its module has two names


def _refuses_ranks(name: str) -> bool:
    """True if there are several ranks, each of which would do the same; rank 0 says so."""
    from phi4_mlx.ranks.launch import launched

    try:
        launch = launched()
    except RequestError as error:
        complain(typed(name), str(error))
        return True
    if launch is not None and launch.rank == 0:
        commands = ", ".join(OVER_RANKS)
        complain(typed(name), f"{launch.size} ranks would all do the same; only {commands} run as ranks")
    return launch is not None


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {typed('')} COMMAND [options]",
            "",
            "The Phi-4-mini family on Apple MLX.",
            "",
            *lines,
            "",
            f"{typed('COMMAND')} --help lists the options of a command; {typed('--version')} prints the version.",
        ]
    )

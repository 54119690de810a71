"""Commands that a message advises, to be typed as they stand."""

from __future__ import annotations

import shlex

from phi4_mlx.terminal.command import typed


def command_line(command: str, *words: str, **options: object) -> str:
    """A command line, quoted for a shell.

    Args:
        command: its name, "chat" for example.
        words: words of the line.
        options: option -> value, in this order; one that is None or "" is left out.
    """
    line = list(words)
    for name, value in options.items():
        if value is not None and str(value):
            option = f"--{name.replace('_', '-')}"
            line += [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]
    return f"{typed(command)} {shlex.join(line)}".rstrip()

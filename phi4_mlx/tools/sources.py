"""The tools that a command's options name: functions of Python files, and MCP servers that run beside the command."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from phi4_mlx.errors import Interruption
from phi4_mlx.tools.toolbox import Tool


@contextlib.contextmanager
def opened_tools(files: Sequence[str], commands: Sequence[str], note: Callable[[str], object]) -> Iterator[list[Tool]]:
    """Reads the files and starts the servers, which run until the end of the block.

    Enter it in the main thread: until the end of the block, SIGTERM and SIGHUP end the servers and then the program.

    Args:
        files: Python files.
        commands: of MCP servers.
        note: called with a line for tools of a server that are left out.

    Yields:
        The tools, as `Toolbox` takes them.

    Raises:
        RequestError: a file or a server has no usable tools.
    """
    with contextlib.ExitStack() as stack:
        tools: list[Tool] = []
        for name in files:
            from phi4_mlx.tools.python_file import tool_functions

            tools += tool_functions(name)
        if commands:
            stack.enter_context(_ended_by_signals())
        for command in commands:
            from phi4_mlx.tools.mcp import mcp_tools

            tools += stack.enter_context(mcp_tools(command, note))
        yield tools


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turns a signal into the end of the block: an MCP server that reads no input would outlive the program."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    except Ended as ended:
        raise SystemExit(128 + ended.args[0]) from None  # as shells count
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Ended(Interruption):
    """A signal that ends the program; the argument is its number."""

"""Tools in the chat: their options, the question before a call is run, and the display of calls and results."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.command import Idle, Parser
from phi4_mlx.terminal.options import add_tool_options
from phi4_mlx.terminal.printable import one_line, visible

if TYPE_CHECKING:
    from phi4_mlx.tools.calls import ToolCall
    from phi4_mlx.tools.toolbox import Toolbox

SHOWN_RESULT = 300  # characters
SHOWN_NOTE = 1000


def add_chat_tool_options(parser: Parser) -> None:
    """Adds `--tools`, `--mcp` and `--allow-tools`."""
    add_tool_options(parser, "the model may call")
    parser.add_argument("--allow-tools", action="store_true", help="run the model's calls without asking")
    parser.idle.append(Idle(("allow_tools",), lambda args: not (args.tools or args.mcp), "without --tools or --mcp"))


@contextlib.contextmanager
def toolbox_of(args: argparse.Namespace, person: bool, note: Callable[[str], None]) -> Iterator[Toolbox]:
    """The tools that the options name, if any; their MCP servers run until it is closed.

    Args:
        args: the options.
        person: True if a person is at the terminal.
        note: called with a line for tools that are left out, and for parts of schemas that calls may break.

    Raises:
        RequestError: a file or a server has no usable tools, or no person is there to approve a call.
    """
    from phi4_mlx.generation.answer import tool_grammar
    from phi4_mlx.tools.sources import opened_tools
    from phi4_mlx.tools.toolbox import Toolbox

    if (args.tools or args.mcp) and not (person or args.allow_tools):
        raise RequestError("no person is at a terminal to approve each call of a tool; --allow-tools runs all calls")
    with opened_tools(args.tools, args.mcp, note) as tools:
        toolbox = Toolbox(tools)
        try:
            grammar = tool_grammar(toolbox.declarations, "auto", toolbox.strict)
            if grammar is not None and grammar.loosened:
                note(_shortened(f"calls may break the tools' schemas in {'; '.join(grammar.loosened)}"))
        except RequestError as error:  # often someone else's tool, and still usable
            toolbox.strict = False
            note(f"calls are not constrained to the tools' schemas: {error}")
        yield toolbox


def _shortened(line: str) -> str:
    return line if len(line) <= SHOWN_NOTE else f"{line[:SHOWN_NOTE]} ... ({len(line):,} characters)"


class Doorkeeper:
    """Asks the person before a call is run, until they answer "always" for its tool.

    Args:
        ask: shows a question and returns the line that the person types.
    """

    def __init__(self, ask: Callable[[str], str]) -> None:
        self._ask = ask
        self._always: set[str] = set()

    def __call__(self, call: ToolCall) -> bool:
        """True if the call may run."""
        if call.name in self._always:
            return True
        answer = self._ask("run it? [y/N/always] ").strip().lower()
        if answer in ("a", "always"):
            self._always.add(call.name)
        return answer in ("y", "yes", "a", "always")


def shown_call(call: ToolCall) -> str:
    """A call on one line. Characters that a terminal would not show are escaped, so that nothing is hidden."""
    return visible(f"{call.name}({', '.join(f'{name}={_json(value)}' for name, value in call.arguments.items())})")


def shown_result(text: str) -> str:
    """The beginning of a result, on one line."""
    line = one_line(text)
    return line if len(line) <= SHOWN_RESULT else f"{line[:SHOWN_RESULT]} ... ({len(text):,} characters)"


def shown_tool(declared: dict[str, Any]) -> str:
    """A tool on one line, for /tools."""
    function = declared["function"]
    text, _, _ = function.get("description", "").partition("\n")
    return visible(f"{function['name']}({', '.join(map(str, function['parameters']['properties']))})  {text}".rstrip())


def _json(value: object) -> str:
    from phi4_mlx.tools.json_text import json_text

    return json_text(value)

"""Answers parsed into text, calls and the first error, for tests of the tool call parser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.parser import ToolCallParser


class Reply(NamedTuple):
    text: str
    calls: tuple[ToolCall, ...]
    error: str | None


def parsed(text: str, tools: Iterable[Any]) -> Reply:
    """A whole answer, parsed in one piece."""
    return parsed_pieces([text], tools)


def parsed_pieces(pieces: Iterable[str], tools: Iterable[Any]) -> Reply:
    """An answer that arrives in pieces; a string arrives by the character."""
    parser = ToolCallParser(tools)
    text = "".join([*map(parser.add, pieces), parser.finish()])
    return Reply(text, parser.calls, parser.error)

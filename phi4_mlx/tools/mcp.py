"""Tools of an MCP server, which is started as a command and uses its standard input and output.

Source: https://modelcontextprotocol.io/specification/2025-06-18
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.terminal.printable import one_line
from phi4_mlx.terminal.version import version
from phi4_mlx.tools.declarations import MAX_TOOLS_BYTES, check_tools
from phi4_mlx.tools.json_rpc import ChildProcess, RpcError
from phi4_mlx.tools.json_text import json_text
from phi4_mlx.tools.toolbox import Tool

PROTOCOL = "2025-06-18"
START_TIMEOUT_S = 30.0  # for the start and the list of tools together
CALL_TIMEOUT_S = 120.0
MAX_PAGES = 100


@contextlib.contextmanager
def mcp_tools(command: str, note: Callable[[str], object] = lambda line: None) -> Iterator[list[Tool]]:
    """Starts a server, and stops it at the end of the block.

    Args:
        command: a program and its arguments, quoted as in a shell; no shell runs it.
        note: called with a line if some of the server's tools cannot be used.

    Yields:
        The server's tools, as `run_tools` takes them.

    Raises:
        RequestError: the server cannot be started, or does not list its tools; gives the reason.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise RequestError(f"{command!r:.200} is not a command: {error}") from None
    if not words:
        raise RequestError("the command of an MCP server is empty; give a program and its arguments")
    name = f"the MCP server {command!r:.200}"
    with contextlib.ExitStack() as stack:
        try:
            server = ChildProcess(words)
            stack.callback(server.close)
            listed, left_out = _listed(server)
        except TimeoutError as error:
            raise RequestError(
                f"{name} cannot be started within {START_TIMEOUT_S:g} s: {error}; check its command, or leave it out"
            ) from None
        except (OSError, ValueError, RecursionError, RpcError) as error:
            raise RequestError(f"{name} cannot be started: {one_line(str(error))[:400]}") from None
        if left_out:
            note(f"{name}: left out {one_line('; '.join(left_out))[:500]}")
        yield [(tool, partial(_call, name, server, tool["function"]["name"])) for tool in listed]


def _listed(server: ChildProcess) -> tuple[list[JsonObject], list[str]]:
    """(the tools in OpenAI's form, a line for each that cannot be used)"""
    ends_at = time.monotonic() + START_TIMEOUT_S

    def left() -> float:
        return max(ends_at - time.monotonic(), 0.0)

    client = {"name": "phi4-mlx", "version": version()}
    server.request("initialize", {"protocolVersion": PROTOCOL, "capabilities": {}, "clientInfo": client}, left())
    server.notify("notifications/initialized", {})
    tools: dict[str, JsonObject] = {}
    left_out: list[str] = []
    seen: set[str] = set()
    size = 0
    params: JsonObject = {}
    while True:
        page = server.request("tools/list", params, left())
        given = page.get("tools")
        if not isinstance(given, list):
            raise RpcError(f"its list of tools is not a list: {json_text(given)[:100]}")
        for each in given:
            try:
                tool = _declaration(each)
                if (name := tool["function"]["name"]) in tools:
                    raise RequestError(f"a second tool {name!r}")
                if (size := size + len(json_text(tool).encode())) > MAX_TOOLS_BYTES:
                    raise RpcError(f"its tools have over {MAX_TOOLS_BYTES:,} bytes, the limit")
                tools[name] = tool
            except RequestError as error:
                left_out.append(str(error)[:200])
        cursor = page.get("nextCursor")
        if cursor is None or cursor == "":
            return list(tools.values()), left_out
        if not isinstance(cursor, str) or cursor in seen or len(seen) == MAX_PAGES - 1:
            left_out.append(f"the pages of tools after {len(seen) + 1}, which have no end")
            return list(tools.values()), left_out
        seen.add(cursor)
        params = {"cursor": cursor}


def _declaration(tool: Any) -> JsonObject:
    """A tool in OpenAI's form.

    Raises:
        RequestError: it is malformed.
    """
    if not isinstance(tool, dict):
        raise RequestError(f"a tool that is not an object: {json_text(tool)[:100]}")
    schema = tool.get("inputSchema") or {}
    if not isinstance(schema, dict):
        raise RequestError(
            f"tool {tool.get('name')!r:.100}: its inputSchema is not an object: {json_text(schema)[:100]}"
        )
    function = {"name": tool.get("name"), "parameters": {"type": "object", **schema}}
    if isinstance(tool.get("description"), str):
        function["description"] = tool["description"]
    (checked,) = check_tools([{"type": "function", "function": function}])
    return checked


def _call(source: str, server: ChildProcess, name: str, /, **arguments: Any) -> str:
    """Runs a tool and returns its text; raises an exception if the server does not answer."""
    try:
        result = server.request("tools/call", {"name": name, "arguments": arguments}, CALL_TIMEOUT_S)
    except TimeoutError as error:
        raise TimeoutError(f"{source}: {error}, {CALL_TIMEOUT_S:g} s") from None
    except RpcError as error:
        raise RpcError(f"{source}: {error}") from None
    content = result.get("content")
    text = "\n".join(map(_text, content if isinstance(content, list) else []))
    if not text and result.get("structuredContent") is not None:
        text = json_text(result["structuredContent"])
    return f"error: {text}" if result.get("isError") else text


def _text(part: Any) -> str:
    """The text of a part of a result."""
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else f"[{str(kind)[:100]}, which is not text]"

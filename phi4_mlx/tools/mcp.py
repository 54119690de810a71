"""Tools of an MCP server, which is started as a command and uses its standard input and output.

The `mcp` package is an optional dependency, imported when a server is started. It is asynchronous: a server's client
runs on its own thread, and each tool is an ordinary function here.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.tools.toolbox import Tool

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal
    from mcp import ClientSession
    from pydantic import BaseModel

START_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 120.0


@contextlib.contextmanager
def mcp_tools(command: str) -> Iterator[list[Tool]]:
    """Starts a server, and stops it at the end of the block.

    Args:
        command: a program and its arguments, quoted as in a shell; no shell runs it.

    Yields:
        The server's tools, as `run_tools` takes them.

    Raises:
        RequestError: the `mcp` package is not installed, or the server cannot be started; gives the reason.
    """
    try:
        import mcp  # noqa: F401  (so that the error names this package)
        from anyio.from_thread import start_blocking_portal
    except ModuleNotFoundError as error:
        raise RequestError(f"{error.name} is not installed; install it with pip install 'phi4-mlx[mcp]'") from None
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise RequestError(f"{command!r:.200} is not a command: {error}") from None
    if not words:
        raise RequestError("the command of an MCP server is empty; give a program and its arguments")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        portal = stack.enter_context(start_blocking_portal())
        try:
            session = stack.enter_context(portal.wrap_async_context_manager(_session(words, log)))
            listed = portal.call(_listed, session)
        except Exception as error:
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()] or [_reason(error)]
            raise RequestError(f"the MCP server {command!r:.200} cannot be started: {lines[-1][:300]}") from None
        try:
            yield [(_declaration(tool), partial(_call, portal, session, tool["name"])) for tool in listed]
        finally:
            stack.close()  # before an exception of the block reaches anyio, which would wrap it in a group


@contextlib.asynccontextmanager
async def _session(words: list[str], log: TextIO) -> AsyncIterator[ClientSession]:
    import anyio
    from mcp import ClientSession
    from mcp.client.stdio import StdioServerParameters, stdio_client

    server = StdioServerParameters(command=words[0], args=words[1:], env=dict(os.environ))
    async with stdio_client(server, errlog=log) as (read, write), ClientSession(read, write) as session:
        with anyio.fail_after(START_TIMEOUT_S):
            await session.initialize()
        yield session


async def _listed(session: ClientSession) -> list[JsonObject]:
    """The tools of the first page; more would not fit a model's context."""
    import anyio

    with anyio.fail_after(START_TIMEOUT_S):
        return [_plain(tool) for tool in (await session.list_tools()).tools]


def _declaration(tool: Mapping[str, Any]) -> JsonObject:
    function = {"name": tool["name"], "parameters": {"type": "object", **(tool.get("inputSchema") or {})}}
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _call(portal: BlockingPortal, session: ClientSession, name: str, /, **arguments: Any) -> str:
    """Runs a tool and returns its text; raises an exception if the server does not answer."""
    future = portal.start_task_soon(session.call_tool, name, arguments)
    try:
        result = _plain(future.result(CALL_TIMEOUT_S))
    except BaseException:
        future.cancel()
        raise
    parts = [part.get("text", f"[{part.get('type')}, which is not text]") for part in result.get("content", [])]
    text = "\n".join(parts)
    return f"error: {text}" if result.get("isError") else text


def _plain(model: BaseModel) -> JsonObject:
    """A message with the protocol's own names; those of the Python package differ by version."""
    plain: JsonObject = model.model_dump(by_alias=True, mode="json")
    return plain


def _reason(error: BaseException) -> str:
    """The first exception of a group, in one line."""
    while inner := getattr(error, "exceptions", None):  # ExceptionGroup came with Python 3.11
        error = inner[0]
    return " ".join(f"{type(error).__name__}: {error}".split())

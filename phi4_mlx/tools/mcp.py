"""Tools of an MCP server that is started as a command and spoken with over its standard input and output.

The `mcp` package is an extra, imported when a server is asked for. It is asynchronous: a server lives on a thread of
its own, and each of its tools is an ordinary function here.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.tools.toolbox import Tool

START_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 120.0


@contextlib.contextmanager
def mcp_tools(command: str) -> Iterator[list[Tool]]:
    """Starts a server, and stops it in the end.

    Args:
        command: as one types it in a shell; it is not given to one.

    Yields:
        Its tools, as `run_tools` takes them.

    Raises:
        RequestError: the `mcp` package is not there, or the server cannot be started; says why.
    """
    try:
        import mcp  # noqa: F401  (named in the error, before anything else can fail)
        from anyio.from_thread import start_blocking_portal
    except ModuleNotFoundError as error:
        raise RequestError(f"{error.name} is not installed; pip install 'phi4-mlx[mcp]' brings it along") from None
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise RequestError(f"{command!r:.200} is no command: {error}") from None
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
            said = [line.strip() for line in log if line.strip()] or [_reason(error)]
            raise RequestError(f"the MCP server {command!r:.200} cannot be started: {said[-1][:300]}") from None
        try:
            yield [(_declaration(tool), partial(_call, portal, session, tool["name"])) for tool in listed]
        finally:
            stack.close()  # not by the exception that ends the block, which anyio would wrap into a group


@contextlib.asynccontextmanager
async def _session(words: list[str], log: Any) -> AsyncIterator[Any]:
    import anyio
    from mcp import ClientSession
    from mcp.client.stdio import StdioServerParameters, stdio_client

    server = StdioServerParameters(command=words[0], args=words[1:], env=dict(os.environ))
    async with stdio_client(server, errlog=log) as (read, write), ClientSession(read, write) as session:
        with anyio.fail_after(START_TIMEOUT_S):
            await session.initialize()
        yield session


async def _listed(session: Any) -> list[dict[str, Any]]:
    """The tools of the first page; a model has use for no more than that."""
    import anyio

    with anyio.fail_after(START_TIMEOUT_S):
        return [_plain(tool) for tool in (await session.list_tools()).tools]


def _declaration(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": tool["name"], "parameters": {"type": "object", **(tool.get("inputSchema") or {})}}
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _call(portal: Any, session: Any, name: str, /, **arguments: Any) -> str:
    """Runs a tool and returns what it says; raises what goes wrong on the way."""
    future = portal.start_task_soon(session.call_tool, name, arguments)
    try:
        result = _plain(future.result(CALL_TIMEOUT_S))
    except BaseException:
        future.cancel()  # nobody waits for it any more
        raise
    parts = [part.get("text", f"[{part.get('type')}, which is no text]") for part in result.get("content", [])]
    text = "\n".join(parts)
    return f"error: {text}" if result.get("isError") else text


def _plain(model: Any) -> dict[str, Any]:
    """A message of the protocol under its names there; those of its Python package differ by version."""
    plain: dict[str, Any] = model.model_dump(by_alias=True, mode="json")
    return plain


def _reason(error: BaseException) -> str:
    """The first cause in a group of exceptions, in one line."""
    while inner := getattr(error, "exceptions", None):
        error = inner[0]
    return " ".join(f"{type(error).__name__}: {error}".split())

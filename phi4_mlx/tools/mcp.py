"""Tools of an MCP server, which is started as a command and uses its standard input and output.

The `mcp` package is an optional dependency, imported when a server is started. It is asynchronous: a server's client
runs on its own thread, and each tool is an ordinary function here. The server is not trusted: its start and its calls
have time limits, and of its standard error only the end is kept.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import shlex
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from phi4_mlx.errors import RequestError, message_of
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.terminal.printable import one_line
from phi4_mlx.tools.declarations import MAX_TOOLS_BYTES, check_tools
from phi4_mlx.tools.json_text import json_text
from phi4_mlx.tools.toolbox import Tool

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal
    from mcp import ClientSession
    from pydantic import BaseModel

START_TIMEOUT_S = 30.0  # for the start and the list of tools together
CALL_TIMEOUT_S = 120.0
MAX_PAGES = 100  # of a list of tools
LOG_BYTES = 4096  # of the end of standard error


@contextlib.contextmanager
def mcp_tools(command: str, note: Callable[[str], object] = lambda line: None) -> Iterator[list[Tool]]:
    """Starts a server, and stops it at the end of the block.

    Args:
        command: a program and its arguments, quoted as in a shell; no shell runs it.
        note: called with one line if some of the server's tools cannot be used.

    Yields:
        The server's tools, as `run_tools` takes them.

    Raises:
        RequestError: the `mcp` package is not installed, the server cannot be started, or it does not list its tools;
            gives the reason.
    """
    try:
        import mcp  # noqa: F401  (so that the error names this package)
        from anyio.from_thread import start_blocking_portal
    except ModuleNotFoundError as error:
        install = f"{shlex.quote(sys.executable)} -m pip install 'mcp>=2'"
        raise RequestError(f"{error.name} is not installed; install it with {install}") from None
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise RequestError(f"{command!r:.200} is not a command: {error}") from None
    if not words:
        raise RequestError("the command of an MCP server is empty; give a program and its arguments")
    name = f"the MCP server {command!r:.200}"
    logging.getLogger("mcp").disabled = logging.getLogger("mcp.client.stdio").disabled = True  # tracebacks of bad lines
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_Log())
        portal = stack.enter_context(start_blocking_portal())
        try:
            session, listed = stack.enter_context(portal.wrap_async_context_manager(_session(words, log.pipe)))
            declared, left_out = _declarations(listed)
        except Exception as error:
            reason = _reason(error, f"it did not list its tools within {START_TIMEOUT_S:g} s")
            raise RequestError(f"{name} cannot be started: {log.last_line() or reason}") from None
        if left_out:
            note(f"{name}: left out {one_line('; '.join(left_out))[:500]}")
        try:
            yield [(tool, partial(_call, name, portal, session, tool["function"]["name"])) for tool in declared]
        finally:
            stack.close()  # before an exception of the block reaches anyio, which would wrap it in a group


class _Log:
    """The standard error of a process, of which a thread keeps the end.

    Attributes:
        pipe: what the process writes to.
    """

    def __init__(self) -> None:
        self._read, write = os.pipe()
        self.pipe: TextIO = os.fdopen(write, "w")
        self._end = b""
        self._thread = threading.Thread(target=self._drain, daemon=True)

    def __enter__(self) -> _Log:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()

    def last_line(self) -> str:
        """The last line that is not empty, of at most 300 characters; call it when the process has ended."""
        self.pipe.close()
        self._thread.join(1.0)
        lines = [line for line in self._end.decode(errors="replace").splitlines() if line.strip()]
        return one_line(lines[-1])[:300] if lines else ""

    def _drain(self) -> None:
        while data := os.read(self._read, 2**16):
            self._end = (self._end + data)[-LOG_BYTES:]
        os.close(self._read)


@contextlib.asynccontextmanager
async def _session(words: list[str], log: TextIO) -> AsyncIterator[tuple[ClientSession, list[JsonObject]]]:
    """A session with a server, and the tools that it lists."""
    import anyio
    from mcp import ClientSession
    from mcp.client.stdio import StdioServerParameters, stdio_client

    # Programs also print lines of their own to their output, in any encoding; the package skips what is no message.
    server = StdioServerParameters(
        command=words[0], args=words[1:], env=dict(os.environ), encoding_error_handler="replace"
    )
    async with stdio_client(server, errlog=log) as (read, write), ClientSession(read, write) as session:
        with anyio.fail_after(START_TIMEOUT_S):
            await session.initialize()
            tools = await _listed(session)
        yield session, tools


async def _listed(session: ClientSession) -> list[JsonObject]:
    """The tools of all pages.

    Raises:
        RequestError: they have too many pages or bytes.
    """
    from mcp.types import PaginatedRequestParams

    tools: list[JsonObject] = []
    size = 0
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page = await session.list_tools(params=PaginatedRequestParams(cursor=cursor) if cursor else None)
        found = [*map(_plain, page.tools)]
        tools += found
        size += len(json_text(found))
        if size > MAX_TOOLS_BYTES:
            raise RequestError(f"its tools have over {MAX_TOOLS_BYTES:,} bytes, the limit")
        cursor = page.next_cursor
        if not cursor:
            return tools
    raise RequestError(f"its list of tools has over {MAX_PAGES} pages, the limit")


def _declarations(listed: list[JsonObject]) -> tuple[list[JsonObject], list[str]]:
    """(the tools in OpenAI's form, a line for each that cannot be used)"""
    declared: dict[str, JsonObject] = {}
    left_out: list[str] = []
    for tool in listed:
        function = {"name": tool["name"], "parameters": {"type": "object", **tool["inputSchema"]}}
        if tool.get("description"):
            function["description"] = tool["description"]
        try:
            (checked,) = check_tools([{"type": "function", "function": function}])
        except RequestError as error:
            left_out.append(str(error)[:200])
            continue
        if declared.setdefault(tool["name"], checked) is not checked:
            left_out.append(f"a second tool {tool['name']!r}")
    return list(declared.values()), left_out


def _call(source: str, portal: BlockingPortal, session: ClientSession, name: str, /, **arguments: Any) -> str:
    """Runs a tool and returns its text; raises an exception if the server does not answer."""
    future = portal.start_task_soon(session.call_tool, name, arguments)
    try:
        result = _plain(future.result(CALL_TIMEOUT_S))
    except Exception as error:
        future.cancel()
        raise RuntimeError(f"{source}: {_reason(error, f'it did not answer within {CALL_TIMEOUT_S:g} s')}") from None
    except BaseException:
        future.cancel()
        raise
    parts = [part.get("text", f"[{part.get('type')}, which is not text]") for part in result.get("content", [])]
    text = "\n".join(parts)
    if not text and result.get("structuredContent") is not None:
        text = json_text(result["structuredContent"])
    return f"error: {text}" if result.get("isError") else text


def _plain(model: BaseModel) -> JsonObject:
    """A message with the protocol's own names."""
    plain: JsonObject = model.model_dump(by_alias=True, mode="json")
    return plain


def _reason(error: BaseException, late: str) -> str:
    """The first exception of a group, in one line; `late` for one that says nothing but that time is up."""
    from pydantic import ValidationError

    while inner := getattr(error, "exceptions", None):  # ExceptionGroup came with Python 3.11
        error = inner[0]
    if isinstance(error, (TimeoutError, concurrent.futures.TimeoutError)):
        return late
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return f"its answer is malformed: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return one_line(message_of(error))[:400] or type(error).__name__

"""The server's own tools: the chat page lists them, and runs a call that the person there has confirmed.

A tool acts on this machine, so only the server's own page may use them, whatever other pages may ask of the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phi4_mlx.errors import RequestError, message_of
from phi4_mlx.server.apis import chat as chat_api
from phi4_mlx.server.apis.fields import parse_json, read_body, shown
from phi4_mlx.server.apis.wire import WireError
from phi4_mlx.server.disconnect import ClientGone, unless_gone
from phi4_mlx.server.guard import host_of
from phi4_mlx.server.json_response import JsonResponse
from phi4_mlx.server.limits import TOOL_BODY_BYTES, TOOL_CALLS_LIMIT, TOOL_S
from phi4_mlx.server.request_log import CANCELLED, entry_of
from phi4_mlx.tokens.tokenizer import Tokenizer
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.toolbox import Toolbox, error_text


@contextlib.contextmanager
def opened_toolbox(
    files: Sequence[str], commands: Sequence[str], tokenizer: Tokenizer, note: Callable[[str], object]
) -> Iterator[Toolbox]:
    """The tools that the options name; their MCP servers run until the end of the block.

    Args:
        files: Python files.
        commands: of MCP servers.
        tokenizer: of the model.
        note: called with a line for tools of a server that are left out.

    Raises:
        RequestError: a file or a server has no usable tools, two tools have the same name, the model's chat format has
            no place for tools, or a request with them would be refused.
    """
    from phi4_mlx.tools.sources import opened_tools

    with opened_tools(files, commands, note) as tools:
        toolbox = Toolbox(tools)
        tool_tokens(toolbox, tokenizer)
        _check_requests(toolbox)
        yield toolbox


def _check_requests(toolbox: Toolbox) -> None:
    """Raises RequestError if the server would refuse a request with these tools."""
    body = {"messages": [{"role": "user", "content": ""}], "tools": toolbox.declarations}
    try:
        chat_api.parse(body, 0)
    except WireError as error:
        raise RequestError(f"the page could not send the tools with a question: {error.message}") from None


def tool_tokens(toolbox: Toolbox, tokenizer: Tokenizer) -> int:
    """The length in tokens of the shortest prompt with all tools; 0 without tools.

    Raises:
        RequestError: the chat format has no place for tools.
    """
    question = [{"role": "user", "content": ""}]
    return len(tokenizer.apply_chat_template(question, tools=toolbox.declarations)) if toolbox else 0


class ServerTools:
    """The routes of the tools.

    Args:
        toolbox: the tools, if there are any.
    """

    def __init__(self, toolbox: Toolbox | None = None) -> None:
        self._toolbox = toolbox or Toolbox()
        self._names = [tool["function"]["name"] for tool in self._toolbox.declarations]
        self._running = 0  # calls, also those for which nobody waits any more

    def routes(self) -> list[Route]:
        """The routes, for the application."""
        return [Route("/tools", self.declarations), Route("/tools/call", self.call, methods=["POST"])]

    async def declarations(self, request: Request) -> Response:
        """All tools in OpenAI's form."""
        check_own_page(request)
        return JsonResponse({"data": self._toolbox.declarations})

    async def call(self, request: Request) -> Response:
        """Runs a call; the result, or the reason why there is none, is text for the model."""
        check_own_page(request)
        data = await request.body()
        if len(data) > TOOL_BODY_BYTES:
            raise WireError(413, f"the call is {len(data):,} bytes; the limit is {TOOL_BODY_BYTES:,}")
        call = await asyncio.to_thread(self._read, data)
        entry = entry_of(request.scope)
        entry.tool = call.name
        if self._running >= TOOL_CALLS_LIMIT:
            message = f"{self._running} calls of tools are running, the limit; send the call again when one has ended"
            raise WireError(429, message)
        try:
            content = await unless_gone(request.receive, asyncio.wait_for(self._started(call), TOOL_S))
        except asyncio.TimeoutError:
            content = error_text(f"{call.name} has not answered within {TOOL_S:g} s; it may still be running")
        except ClientGone:
            entry.cancelled = True
            return Response(status_code=CANCELLED)  # never sent
        entry.tool_failed = content.startswith(error_text(""))
        return JsonResponse({"content": content, "is_error": entry.tool_failed})

    def _read(self, data: bytes) -> ToolCall:
        """Reads a call from a body; its tool must exist."""
        fields = read_body(parse_json(data))
        name = fields.needed_name("name")
        if name not in self._names:
            known = f"there are {', '.join(self._names)}" if self._names else "--tools and --mcp give the server some"
            raise WireError(404, f"there is no tool {shown(name)}; {known}", "name", "tool_not_found")
        return ToolCall(name, fields.child("arguments").values)

    def _started(self, call: ToolCall) -> asyncio.Future[str]:
        """Starts a call in a thread of its own, which nothing waits for at the end of the server."""
        loop = asyncio.get_running_loop()
        content: asyncio.Future[str] = loop.create_future()

        def ended(text: str) -> None:
            self._running -= 1
            if not content.done():  # nobody may wait for it any more
                content.set_result(text)

        def run() -> None:
            text = self._result(call)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ended, text)

        try:
            threading.Thread(target=run, name=f"tool {call.name}", daemon=True).start()
        except RuntimeError:
            raise WireError(503, "no thread can be started for the call; send it again in a moment") from None
        self._running += 1
        return content

    def _result(self, call: ToolCall) -> str:
        try:
            problem = self._toolbox.problem(call)
            return self._toolbox.run(call) if problem is None else error_text(problem)
        except BaseException as error:  # a tool may raise KeyboardInterrupt, which is for the main thread alone
            return error_text(f"{type(error).__name__}: {message_of(error)}")


def check_own_page(request: Request) -> None:
    """Lets only programs and the server's own page pass, whatever origins --allowed-origins names.

    Raises:
        WireError: the request comes from another page.
    """
    headers = request.headers
    host = headers.get("host", "").lower()
    foreign = [origin for origin in headers.getlist("origin") if host_of(origin) != host]
    foreign += [site for site in headers.getlist("sec-fetch-site") if site not in ("same-origin", "none")]
    if foreign:
        raise WireError(403, f"only the server's own page may use its tools, and this one is from {foreign[0]!r:.100}")


def check_room(toolbox: Toolbox, tokenizer: Tokenizer, context: int) -> None:
    """Checks that prompts with the tools fit in the context.

    Raises:
        RequestError: they do not.
    """
    if (tokens := tool_tokens(toolbox, tokenizer)) >= context:
        raise RequestError(
            f"the tools take {tokens:,} tokens of each prompt, and the context has {context:,}; leave some out"
        )

"""A server in the test's process that serves the page's own files and answers with what a test has written."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from phi4_mlx.server.page_files import page_file
from tests.e2e.server_process import HANG_S, until

WAIT = object()  # in an answer: the stream waits here until `release`
BREAK = object()  # in an answer: the connection breaks here
Answer = list[Any]  # texts, deltas of OpenAI's form, WAIT and BREAK


class ScriptedServer:
    """A server whose answers a test writes.

    Attributes:
        answers: the next answers, first to last; then each is "All right."
        bodies: the bodies of the chat requests so far.
        calls: the tool calls so far.
        key: the key that requests must send; None for none.
        tools: the tools of the server, in OpenAI's form.
        headers: of each answer.
        kind: of the model.
        media: the settings of its pictures; None for a text-only model.
    """

    def __init__(self) -> None:
        self._released = threading.Event()
        self.reset()
        routes = [
            Route("/", self._page),
            Route("/page/{path:path}", self._page),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/tools", self._tools),
            Route("/tools/call", self._call, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_config=None, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started)
        _, port = self._server.servers[0].sockets[0].getsockname()[:2]
        self.url = f"http://127.0.0.1:{port}"

    def reset(self) -> None:
        """Forgets everything, for the next test."""
        self.answers: list[Answer] = []
        self.bodies: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []
        self.key: str | None = None
        self.tools: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.kind = "instruct"
        self.media: dict[str, int] | None = None

    def release(self) -> None:
        """Lets the answers that wait go on."""
        self._released.set()

    def stop(self) -> None:
        """Ends the server and all its connections."""
        self._server.force_exit = self._server.should_exit = True
        self.release()
        self._thread.join(HANG_S)

    async def _page(self, request: Request) -> Response:
        found = page_file(request.path_params.get("path", "index.html"))
        return found.answer(request) if found else Response(status_code=404)

    async def _models(self, request: Request) -> Response:
        model = {"id": "scripted", "object": "model", "context_length": 4096, "kind": self.kind}
        model |= {"media": self.media} if self.media else {}
        return self._locked(request) or JSONResponse({"object": "list", "data": [model]})

    async def _tools(self, request: Request) -> Response:
        return self._locked(request) or JSONResponse({"data": self.tools})

    async def _call(self, request: Request) -> Response:
        call = await request.json()
        self.calls.append(call)
        failed = call["name"] == "fail"
        return self._locked(request) or JSONResponse({"content": f"result of {call['name']}", "is_error": failed})

    async def _chat(self, request: Request) -> Response:
        if refused := self._locked(request):
            return refused
        self.bodies.append(await request.json())
        answer = self.answers.pop(0) if self.answers else ["All right."]
        if isinstance(answer, Response):
            return answer
        return StreamingResponse(self._events(answer), media_type="text/event-stream", headers=self.headers)

    async def _events(self, answer: Answer) -> AsyncIterator[bytes]:
        reason, tokens = "stop", 0
        for item in answer:
            if item is BREAK:
                raise ConnectionAbortedError
            if item is WAIT:
                self._released.clear()
                while not self._released.is_set():
                    await asyncio.sleep(0.02)
                continue
            delta = {"content": item} if isinstance(item, str) else item
            reason = "tool_calls" if "tool_calls" in delta else reason
            tokens += 1
            yield _event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        yield _event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}})
        yield b"data: [DONE]\n\n"

    def _locked(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "a key is required"}}, 401, {"www-authenticate": "Bearer"})


@contextlib.contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """A server for the time of the tests."""
    server = ScriptedServer()
    try:
        yield server
    finally:
        server.stop()


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """A delta with a tool call."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"tool_calls": [{"index": 0, "id": f"call_{name}", "type": "function", "function": function}]}


def tool(name: str) -> dict[str, Any]:
    """A tool of the server."""
    function = {"name": name, "description": f"Does {name}.", "parameters": {"type": "object", "properties": {}}}
    return {"type": "function", "function": function}


def _event(data: Any) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()

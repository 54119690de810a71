"""The page in Chromium, served with its own headers; the model behind it is a script that each test writes."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from phi4_mlx.server.page_files import page_files

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    collect_ignore_glob = ["test_*.py"]

HANG_S = 60.0
MODEL = {"id": "tiny", "object": "model", "created": 0, "owned_by": "phi4_mlx", "context_length": 4096}


@dataclass
class FakeServer:
    """The files of the page, and an API whose answers a test sets.

    Attributes:
        url: where it listens.
        answer: the pieces of each answer, by the request's JSON; a float among them is a pause in seconds.
        requests: the JSON of each request for an answer.
        key: the key that requests must carry, if any.
    """

    url: str
    answer: Callable[[dict[str, Any]], list[str | float]] = lambda body: ["Hello."]
    requests: list[dict[str, Any]] = field(default_factory=list)
    key: str = ""

    def application(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self._file),
                Route("/page/{path:path}", self._file),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
            ]
        )

    def _file(self, request: Request) -> Response:
        found = page_files().get(request.path_params.get("path", "index.html"))
        return found.answer(request) if found else Response(status_code=404)

    def _refusal(self, request: Request) -> Response | None:
        if not self.key or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        error = {"message": "The API key is missing or wrong.", "type": "authentication_error", "code": "invalid_api_key"}
        return JSONResponse({"error": error}, 401)

    def _models(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse({"object": "list", "data": [MODEL]})

    async def _complete(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.requests.append(body)
        return StreamingResponse(self._stream(self.answer(body)), media_type="text/event-stream")

    def _stream(self, pieces: list[str | float]) -> Iterator[str]:
        for piece in pieces:
            if isinstance(piece, float):
                time.sleep(piece)
            else:
                yield self._event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
        yield self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield self._event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": len(pieces)}})
        yield "data: [DONE]\n\n"

    @staticmethod
    def _event(value: dict[str, Any]) -> str:
        return f"data: {json.dumps(value)}\n\n"


@pytest.fixture(scope="session")
def listening() -> Iterator[FakeServer]:
    """One server for all tests of the session."""
    listener = socket.create_server(("127.0.0.1", 0))
    fake = FakeServer(f"http://127.0.0.1:{listener.getsockname()[1]}")
    server = uvicorn.Server(uvicorn.Config(fake.application(), log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield fake
    server.should_exit = True
    thread.join(10)
    listener.close()


@pytest.fixture
def server(listening: FakeServer) -> FakeServer:
    """The server, as new."""
    listening.answer, listening.key = lambda body: ["Hello."], ""
    listening.requests.clear()
    return listening


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Any, server: FakeServer) -> Iterator[Any]:
    """A browser without anything stored; what a page writes to its console as an error fails the test."""
    context = browser.new_context(base_url=server.url)
    context.set_default_timeout(HANG_S * 1000)
    problems: list[str] = []
    context.on("weberror", lambda error: problems.append(str(error.error)))
    context.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield context
    context.close()
    assert [it for it in problems if "Failed to load resource" not in it] == []


@pytest.fixture
def page(context: Any) -> Any:
    """The chat page, opened."""
    page = context.new_page()
    page.goto("/")
    return page


def ask(page: Any, text: str) -> None:
    """Asks a question and waits for the end of the answer."""
    page.fill("#input", text)
    page.press("#input", "Enter")
    page.wait_for_selector("body:not(.busy) .answer:last-child .stats:not(:empty)")


def until(page: Any, condition: str) -> None:
    """Waits until a JavaScript expression is true (playwright's own wait needs eval, which the page forbids)."""
    end = time.monotonic() + HANG_S
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def axe(page: Any) -> list[str]:
    """The violations that axe-core finds on the page as it is."""
    script = Path(__file__).parent / "vendor" / "axe.js"
    page.evaluate(script.read_text(encoding="utf-8"))  # past the page's policy, as a browser's tools are
    found = page.evaluate("axe.run()")["violations"]
    return [f"{it['id']}: {node['target']} {node['failureSummary']}" for it in found for node in it["nodes"]]


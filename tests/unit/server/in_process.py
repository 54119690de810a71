"""A whole server in this process: routes, service and an engine of a tiny random model, without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx

from phi4_mlx.checkpoint import load
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.server.app import App
from phi4_mlx.server.engine.engine import Engine, limit_note
from phi4_mlx.server.engine.protocol import Event, Failure, Finish, Job, Pong
from phi4_mlx.server.engine.settings import Settings
from phi4_mlx.server.guard import Guard
from phi4_mlx.server.request_log import RequestLog
from phi4_mlx.server.service import Service
from tests.conftest import write_tiny_checkpoint

SIZES = {"max_position_embeddings": 2**14, "original_max_position_embeddings": 2**13}


class InProcessEngine:
    """Stands in for the supervisor: runs one job after another in the event loop's thread."""

    state, restarts, jobs = "ready", 0, 0

    def __init__(self, folder: Path, **settings: Any) -> None:
        model, self.tokenizer = load(folder)
        limits: dict[str, Any] = {"kv_limit_bytes": 2**28, "prefix_limit_bytes": 2**24}
        self.engine = Engine(model, self.tokenizer, Settings(str(folder), **(limits | settings)))
        self.longest, self.note = self.engine.longest, limit_note(self.engine)
        self.vocabulary = model.config.vocab_size
        self._turn: asyncio.Lock | None = None

    async def ping(self) -> Pong:
        return Pong(0, self.engine.gauges())

    async def events(self, job: Job) -> AsyncGenerator[Event, None]:
        if self._turn is None:
            self._turn = asyncio.Lock()
        async with self._turn:
            events = self.engine.submit(job)
            while True:
                for event in events:
                    yield event
                    if isinstance(event, (Finish, Failure)):
                        return
                events = self.engine.step()
                await asyncio.sleep(0)


class InProcessServer:
    """Sends requests to the application as a client on loopback would."""

    def __init__(
        self, folder: Path, adapters: tuple[str, ...] = (), settings: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self.supervisor = InProcessEngine(write_tiny_checkpoint(folder / "tiny", **SIZES), **(settings or {}))
        models: dict[str, str | None] = {"tiny": None} | {name: name for name in adapters}
        self.service = Service(
            self.supervisor,
            self.supervisor.tokenizer,
            models,
            self.supervisor.vocabulary,
            600.0,
            **options,  # type: ignore[arg-type]
        )
        self.app = RequestLog(Guard(App(self.service).starlette(), None, ("127.0.0.1",)))  # type: ignore[arg-type]

    def request(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            self.supervisor._turn = None  # a lock belongs to its event loop
            transport = httpx.ASGITransport(self.app)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:1") as client:
                extra = {} if body is None else {"json": body}
                return await client.request(method, "http://127.0.0.1:1" + path, **extra, **options)

        return asyncio.run(send())

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, body, **options)


def events_of(response: httpx.Response) -> list[JsonObject]:
    """The JSON of a stream's events, without its end marker."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]

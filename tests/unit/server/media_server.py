"""A server of a model that reads pictures and sound, with a scripted engine, in this process."""

from __future__ import annotations

import asyncio
import base64
import io
import wave
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import numpy as np
import PIL.Image

from phi4_mlx.server.app import App
from phi4_mlx.server.bodies import Bodies
from phi4_mlx.server.engine.protocol import Event, Finish, Job, Piece, Pong
from phi4_mlx.server.guard import Guard
from phi4_mlx.server.limits import MEDIA_BODY_BYTES
from phi4_mlx.server.media_reader import MediaReader
from phi4_mlx.server.request_log import RequestLog
from phi4_mlx.server.service import Service
from phi4_mlx.tokens.prompt import MediaSettings
from phi4_mlx.tokens.tokenizer import Tokenizer

SETTINGS = MediaSettings(crop_size=56, max_crops=4, image_token=1, audio_token=2)
LONGEST = 5_000


def picture(width: int = 40, height: int = 30, shade: int = 7, kind: str = "PNG") -> bytes:
    """A picture file."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((height, width, 3), shade, np.uint8)).save(file, kind)
    return file.getvalue()


def clip(seconds: float = 0.5, hertz: float = 440.0, rate: int = 16_000) -> bytes:
    """A WAV file with a tone."""
    times = np.arange(int(seconds * rate)) / rate
    samples = (np.sin(2 * np.pi * hertz * times) * 12_000).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.tobytes())
    return file.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def image_url(data: bytes | None = None, **more: Any) -> dict[str, Any]:
    """A part of a chat completion."""
    url = f"data:image/png;base64,{b64(picture() if data is None else data)}"
    return {"type": "image_url", "image_url": {"url": url, **more}}


def input_audio(data: bytes | None = None) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": b64(clip() if data is None else data), "format": "wav"}}


class ScriptedEngine:
    """Stands in for the supervisor: notes each job, and answers what `reply` makes of it, a word at a time.

    Attributes:
        given: the jobs so far.
        jobs: that run.
        most: that ran at a time.
        together: jobs that must have come before the first is answered.
    """

    state, restarts, note = "ready", 0, ""

    def __init__(self, reply: Callable[[Job], str] = lambda job: "A red square.") -> None:
        self.reply, self.given, self.jobs, self.most = reply, list[Job](), 0, 0
        self.longest, self.together = LONGEST, 0

    async def ping(self) -> Pong:
        return Pong(0, {})

    async def events(self, job: Job) -> AsyncGenerator[Event, None]:
        self.given.append(job)
        self.jobs += 1
        self.most = max(self.most, self.jobs)
        try:
            while len(self.given) < self.together:
                await asyncio.sleep(0.01)
            words = self.reply(job).split(" ")
            for n, word in enumerate(words):
                await asyncio.sleep(0)
                yield Piece(job.id, f" {word}" if n else word)
            yield Finish(job.id, "stop", None, len(job.prompt), 0, len(words))
        finally:
            self.jobs -= 1


class MediaServer:
    """Sends requests to the application as a client on loopback would.

    Attributes:
        engine: the scripted one.
        bodies: the guard's room.
    """

    def __init__(self, tokenizer: Tokenizer, media: bool = True, key: str | None = None, **options: Any) -> None:
        tokenizer.media = SETTINGS if media else None
        self.engine = ScriptedEngine()
        self.bodies = Bodies(MEDIA_BODY_BYTES)
        self.service = Service(
            self.engine,  # type: ignore[arg-type]
            tokenizer,
            {"tiny": None, "mine": "mine"},
            tokenizer.vocab_size,
            600.0,
            media=MediaReader(SETTINGS) if media else None,
            **options,
        )
        self.app = RequestLog(Guard(App(self.service).starlette(), key, ("127.0.0.1",), (), self.bodies))

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:1") as client:
                return await client.request(method, "http://127.0.0.1:1" + path, timeout=60, **options)

        return asyncio.run(send())

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **options)

    def ask(self, *parts: Any, **more: Any) -> httpx.Response:
        """A chat completion about parts."""
        message = {"role": "user", "content": [*parts]}
        return self.post("/v1/chat/completions", {"model": "tiny", "messages": [message], **more})

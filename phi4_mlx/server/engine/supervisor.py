"""Keeps an engine running in a process of its own, and passes jobs and events between it and the event loop.

An engine that dies is started again. Jobs of which nothing has been told yet are given to the new one, once; the others
fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import multiprocessing
import queue
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.server.engine import engine
from phi4_mlx.server.engine.protocol import Broken, Cancel, Event, Failure, Finish, Job, Ping, Pong, Ready

PING_S = 30.0  # what a chunk of a prompt may take on a slow machine
PAUSES_S = (0.0, 0.5, 2.0, 5.0, 10.0)  # before an engine that keeps dying is started again


class Full(Exception):
    """There are as many jobs as there may be; come again later."""


@dataclass(eq=False)
class _Client:
    """A job, and whoever waits for its events."""

    job: Job
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    told: bool = False  # something of it has been passed on
    begun_again: bool = False


class Supervisor:
    """The engine as the server sees it. All methods are for the event loop's thread.

    Attributes:
        state: "loading", "ready", "restarting" or "stopped".
        restarts: how often a dead engine was started again.
        longest: tokens that a prompt and its answer may come to, once the engine is ready.
    """

    def __init__(self, settings: engine.Settings, max_jobs: int):
        self._settings, self._max_jobs = settings, max_jobs
        self._clients: dict[int, _Client] = {}
        self._pongs: dict[int, asyncio.Future[Pong | None]] = {}
        self._numbers = itertools.count(1)
        self._process: Any = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._deaths = 0  # since the last one that became ready
        self._ready: asyncio.Future[None] | None = None
        self.state, self.restarts, self.longest = "loading", 0, 0

    @property
    def jobs(self) -> int:
        """Jobs that have not ended."""
        return len(self._clients)

    async def start(self) -> None:
        """Starts the engine, and waits until its model is loaded.

        Raises:
            Phi4Error: the model cannot be loaded.
        """
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._launch()
        await self._ready

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends the engine; jobs under way may end first, for so many seconds."""
        deadline = time.monotonic() + grace_s
        while self._clients and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.state = "stopped"
        self._fail_all("the server is stopping")
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.join)

    async def events(self, job: Job) -> AsyncGenerator[Event, None]:
        """Gives a job to the engine and yields its events; whoever stops listening cancels it.

        Args:
            job: its `id` is given here.

        Raises:
            Full: there are too many jobs.
        """
        if len(self._clients) >= self._max_jobs:
            raise Full
        if self.state == "stopped":
            yield Failure(job.id, 503, "the server is stopping, or its engine could not be started again")
            return
        job = dataclasses.replace(job, id=next(self._numbers))
        client = self._clients[job.id] = _Client(job)
        self._outbox.put(job)
        try:
            while True:
                event = await client.events.get()
                ended = isinstance(event, (Finish, Failure))
                if ended:
                    self._clients.pop(job.id, None)  # nothing is left to cancel
                yield event
                if ended:
                    return
        finally:
            if self._clients.pop(job.id, None) is not None:
                self._outbox.put(Cancel(job.id))

    async def ping(self, timeout_s: float = PING_S) -> Pong | None:
        """Asks the engine what it is at; None if it does not answer in time, or is not there."""
        if self.state != "ready":
            return None
        number = next(self._numbers)
        answer = self._pongs[number] = self._loop.create_future()
        self._outbox.put(Ping(number))
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except asyncio.TimeoutError:
            return None
        finally:
            self._pongs.pop(number, None)

    def _launch(self) -> None:
        """Starts a process, and the two threads that read from it and write to it."""
        if self.state == "stopped":
            return
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads, or with Metal, is not safe
        ours, theirs = context.Pipe()
        self._process = context.Process(target=engine.run, args=(theirs, self._settings), daemon=True)
        self._process.start()
        theirs.close()
        self._outbox = queue.SimpleQueue()
        for client in self._clients.values():
            if not client.told:
                self._outbox.put(client.job)
        for work in (self._listen, self._write):
            threading.Thread(target=work, args=(self._process, ours, self._outbox), daemon=True).start()

    def _listen(self, process: Any, connection: Connection, outbox: queue.SimpleQueue[Any]) -> None:
        """A thread: carries what the engine says to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            try:
                while True:
                    self._loop.call_soon_threadsafe(self._receive, process, connection.recv())
            except (EOFError, OSError):
                outbox.put(None)
                process.join()
                self._loop.call_soon_threadsafe(self._died, process)

    def _write(self, process: Any, connection: Connection, outbox: queue.SimpleQueue[Any]) -> None:
        """A thread: carries what the event loop says to the engine, which may be slow to take it."""
        with contextlib.suppress(OSError):
            while (message := outbox.get()) is not None:
                connection.send(message)

    def _receive(self, process: Any, message: list[Event] | Pong | Ready | Broken) -> None:
        if process is not self._process:
            return
        if isinstance(message, list):
            for event in message:
                self._tell(event)
        elif isinstance(message, Pong):
            if (answer := self._pongs.get(message.number)) is not None and not answer.done():
                answer.set_result(message)
        elif isinstance(message, Ready):
            self.state, self.longest, self._deaths = "ready", message.longest, 0
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
        else:
            self._give_up(message.message)

    def _tell(self, event: Event) -> None:
        if (client := self._clients.get(event.job)) is not None:
            client.told = True
            client.events.put_nowait(event)

    def _died(self, process: Any) -> None:
        """Sees to the jobs of an engine that is gone, and starts another."""
        if process is not self._process or self.state == "stopped":
            return
        for answer in self._pongs.values():
            if not answer.done():
                answer.set_result(None)
        if self._deaths >= len(PAUSES_S):
            return self._give_up(f"the engine ended {self._deaths + 1} times (last with {process.exitcode})")
        for client in self._clients.values():
            client.told |= client.begun_again
            if client.told:
                message = "the engine ended while it answered, and is started again; ask again"
                client.events.put_nowait(Failure(client.job.id, 503, message))
            client.begun_again = True
        self.state, self.restarts = "restarting", self.restarts + 1
        self._loop.call_later(PAUSES_S[self._deaths], self._launch)
        self._deaths += 1

    def _give_up(self, why: str) -> None:
        self.state = "stopped"
        self._fail_all(why)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(RequestError(why))

    def _fail_all(self, why: str) -> None:
        for client in self._clients.values():
            client.events.put_nowait(Failure(client.job.id, 503, why))

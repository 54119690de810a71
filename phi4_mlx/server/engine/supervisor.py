"""Runs an engine in its own process, and passes jobs and events between that process and the event loop.

An engine that dies is restarted. Jobs without any event so far are given to the new engine, once; the others fail.
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
from multiprocessing.context import SpawnProcess

from phi4_mlx.errors import RequestError
from phi4_mlx.server.engine import engine
from phi4_mlx.server.engine.protocol import Cancel, Command, Event, Failure, Finish, Job, Ping, Pong, Ready, Report

PING_S = 30.0  # an engine answers between two chunks of a prefill, which take long on a slow machine
PAUSES_S = (0.0, 0.5, 2.0, 5.0, 10.0)  # before each restart of an engine that dies before it is ready

Outbox = queue.SimpleQueue[Command | None]  # None ends the thread that reads it


class Full(Exception):
    """The number of jobs is at its limit."""


@dataclass(eq=False)
class _Client:
    """A job, and the queue of its events."""

    job: Job
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    started: bool = False  # it has had an event
    retried: bool = False  # a second engine has it


class Supervisor:
    """The server's interface to the engine. All public methods must be called in the event loop's thread.

    Args:
        settings: for the engine.
        max_jobs: most jobs at a time, running and waiting.

    Attributes:
        state: "loading", "ready", "restarting" or "stopped".
        restarts: number of restarts of a dead engine.
        longest: most tokens of a prompt and its answer; 0 until the engine is ready.
    """

    def __init__(self, settings: engine.Settings, max_jobs: int) -> None:
        self._settings, self._max_jobs = settings, max_jobs
        self._clients: dict[int, _Client] = {}
        self._pongs: dict[int, asyncio.Future[Pong | None]] = {}
        self._numbers = itertools.count(1)
        self._process: SpawnProcess | None = None
        self._outbox: Outbox = queue.SimpleQueue()
        self._deaths = 0  # since an engine was last ready
        self._ready: asyncio.Future[None] | None = None
        self.state, self.restarts, self.longest = "loading", 0, 0

    @property
    def jobs(self) -> int:
        """Jobs that have not ended."""
        return len(self._clients)

    async def start(self) -> None:
        """Starts the engine and waits until its model is loaded.

        Raises:
            Phi4Error: the model cannot be loaded.
        """
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._launch()
        await self._ready

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends the engine; waits up to `grace_s` seconds for running jobs."""
        deadline = time.monotonic() + grace_s
        while self._clients and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.state = "stopped"
        self._fail_all("the server is stopping")
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.join)

    async def events(self, job: Job) -> AsyncGenerator[Event, None]:
        """Gives a job to the engine and yields its events; closing the generator cancels the job.

        Args:
            job: the job; its `id` is replaced.

        Raises:
            Full: the number of jobs is at its limit.
        """
        if len(self._clients) >= self._max_jobs:
            raise Full
        if self.state == "stopped":
            yield Failure(job.id, 503, "the server is stopping, or its engine could not be restarted")
            return
        job = dataclasses.replace(job, id=next(self._numbers))
        client = self._clients[job.id] = _Client(job)
        self._outbox.put(job)
        try:
            while True:
                event = await client.events.get()
                ended = isinstance(event, (Finish, Failure))
                if ended:
                    self._clients.pop(job.id, None)  # before the yield, so that nothing is left to cancel
                yield event
                if ended:
                    return
        finally:
            if self._clients.pop(job.id, None) is not None:
                self._outbox.put(Cancel(job.id))

    async def ping(self, timeout_s: float = PING_S) -> Pong | None:
        """The state of the engine; None if it is not running or does not answer in `timeout_s` seconds."""
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
        """Starts a process, and two threads that read from it and write to it."""
        if self.state == "stopped":
            return
        context = multiprocessing.get_context("spawn")  # forking a process with threads or Metal is unsafe
        ours, theirs = context.Pipe()
        process = self._process = context.Process(target=engine.run, args=(theirs, self._settings), daemon=True)
        process.start()
        theirs.close()
        self._outbox = queue.SimpleQueue()
        for client in self._clients.values():
            if not client.started:
                self._outbox.put(client.job)
        threading.Thread(target=self._read, args=(process, ours, self._outbox), daemon=True).start()
        threading.Thread(target=_write, args=(ours, self._outbox), daemon=True).start()

    def _read(self, process: SpawnProcess, connection: Connection, outbox: Outbox) -> None:
        """A thread: passes the engine's reports to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            try:
                while True:
                    self._loop.call_soon_threadsafe(self._receive, process, connection.recv())
            except (EOFError, OSError):
                outbox.put(None)
                process.join()
                self._loop.call_soon_threadsafe(self._died, process)

    def _receive(self, process: SpawnProcess, report: Report) -> None:
        if process is not self._process:
            return
        if isinstance(report, list):
            for event in report:
                self._deliver(event)
        elif isinstance(report, Pong):
            if (answer := self._pongs.get(report.number)) is not None and not answer.done():
                answer.set_result(report)
        elif isinstance(report, Ready):
            self.state, self.longest, self._deaths = "ready", report.longest, 0
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
        else:
            self._give_up(report.message)

    def _deliver(self, event: Event) -> None:
        if (client := self._clients.get(event.job)) is not None:
            client.started = True
            client.events.put_nowait(event)

    def _died(self, process: SpawnProcess) -> None:
        """Fails or keeps the jobs of a dead engine, and starts another."""
        if process is not self._process or self.state == "stopped":
            return
        for answer in self._pongs.values():
            if not answer.done():
                answer.set_result(None)
        if self._deaths >= len(PAUSES_S):
            return self._give_up(f"the engine died {self._deaths + 1} times (last exit code {process.exitcode})")
        for client in self._clients.values():
            if client.started or client.retried:
                client.started = True  # the next engine does not get it
                message = "the engine died during this answer and is restarting; ask again"
                client.events.put_nowait(Failure(client.job.id, 503, message))
            client.retried = True
        self.state, self.restarts = "restarting", self.restarts + 1
        self._loop.call_later(PAUSES_S[self._deaths], self._launch)
        self._deaths += 1

    def _give_up(self, reason: str) -> None:
        self.state = "stopped"
        self._fail_all(reason)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(RequestError(reason))

    def _fail_all(self, reason: str) -> None:
        for client in self._clients.values():
            client.events.put_nowait(Failure(client.job.id, 503, reason))


def _write(connection: Connection, outbox: Outbox) -> None:
    """A thread: passes commands to the engine, which may be slow to read them."""
    with contextlib.suppress(OSError):
        while (message := outbox.get()) is not None:
            connection.send(message)

"""Keeps an engine running, and passes jobs and events between its process and the event loop.

An engine that dies or hangs is replaced. Jobs without any event so far are given to the new engine, once; the others
fail. When no engine starts any more, the supervisor gives up, and the server ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from phi4_mlx.errors import RequestError
from phi4_mlx.ranks.launch import launched
from phi4_mlx.server.engine import process
from phi4_mlx.server.engine.process import EngineProcess
from phi4_mlx.server.engine.protocol import (
    Beat,
    Cancel,
    Event,
    Failure,
    Finish,
    Job,
    Notice,
    Pong,
    Ready,
    Report,
)
from phi4_mlx.server.engine.settings import Settings
from phi4_mlx.server.limits import STORING_S
from phi4_mlx.server.log import LOG
from phi4_mlx.terminal.command import OUR_MISTAKE

PING_S = 30.0  # an engine answers between two chunks of a prefill, which take long on a slow machine
SILENT_S = 5.0  # without a beat, after which an engine counts as frozen
PAUSES_S = (0.0, 0.5, 1.0, 1.5, 2.0)  # before each start of an engine after a failed one; the last repeats
RESTART_S = 40.0  # of failed starts, after which an engine that once was ready is given up
LATE_S = 4.0  # beyond a job's own limit, after which it ends without the engine
EVENTS_LIMIT = 1024  # that wait for a client that does not read


class Full(Exception):
    """The number of jobs is at its limit."""


@dataclass(eq=False)
class _Client:
    """A job, and the queue of its events."""

    job: Job
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    started: bool = False  # it has had an event
    retried: bool = False  # a second engine has it
    ended: bool = False  # its last event is in the queue

    def put(self, event: Event) -> None:
        """Queues an event, unless the last one has been queued."""
        if not self.ended:
            self.started, self.ended = True, isinstance(event, (Finish, Failure))
            self.events.put_nowait(event)

    def deliver(self, event: Event) -> bool:
        """Queues an event; a client that leaves too many unread fails instead, and the result is False."""
        full = self.events.qsize() >= EVENTS_LIMIT and not self.ended
        if full:
            self.fail(503, f"the client has left {EVENTS_LIMIT} parts of its answer unread")
        else:
            self.put(event)
        return not full

    def fail(self, status: int, message: str) -> None:
        """Queues a failure as the last event."""
        self.put(Failure(self.job.id, status, message))


class _Failures:
    """The failed starts since an engine was last ready."""

    def __init__(self) -> None:
        self.count, self._since = 0, time.monotonic()

    def pause_s(self, was_ready: bool) -> float | None:
        """Counts a failure; returns the seconds before the next start, or None if there should be none.

        Args:
            was_ready: True if an engine has ever been ready.
        """
        if not self.count:
            self._since = time.monotonic()
        self.count += 1
        long = not was_ready or time.monotonic() - self._since >= RESTART_S
        if self.count > len(PAUSES_S) and long:
            return None
        return PAUSES_S[min(self.count, len(PAUSES_S)) - 1]


class Supervisor:
    """The server's interface to the engine. All public methods must be called in the event loop's thread.

    Args:
        settings: for the engine.
        max_jobs: most jobs at a time, running and waiting.

    Attributes:
        state: "loading", "ready", "frozen" (no sign of life for some seconds), "restarting" or "stopped".
        restarts: number of times that an engine was lost or could not be started.
        job_ended: True if the job of all ranks has ended; a watcher has printed why.
        longest, note: those of `Ready`; 0 and "" until the engine is ready.
    """

    def __init__(self, settings: Settings, max_jobs: int) -> None:
        self._settings, self._max_jobs, self._over_ranks = settings, max_jobs, launched() is not None
        self._clients: dict[int, _Client] = {}
        self._numbers = itertools.count(1)
        self._engine: EngineProcess | None = None
        self._watching: asyncio.Task[None] | None = None
        self._failures = _Failures()
        self._started, self._given_up, self._reason = asyncio.Event(), asyncio.Event(), ""
        self.job_ended = False
        self.state, self.restarts, self.longest, self.note = "loading", 0, 0, ""

    @property
    def jobs(self) -> int:
        """Jobs that have not ended."""
        return len(self._clients)

    async def start(self) -> None:
        """Starts the engine and waits until its model is loaded.

        Raises:
            Phi4Error: the model cannot be loaded.
        """
        self._watching = asyncio.create_task(self._watch())
        self._launch()
        await self._started.wait()
        if self._given_up.is_set():
            raise RequestError(self._reason)

    async def lost(self) -> str:
        """Waits until no engine can be started any more; returns the reason in one line."""
        await self._given_up.wait()
        return self._reason

    def drain(self) -> None:
        """Fails the jobs that wait behind those that the engine works on."""
        for client in list(self._clients.values())[self._settings.max_rows :]:
            if not client.started:
                client.fail(503, "the server is stopping")
                self._cancel(client)

    async def stop(self) -> None:
        """Ends the engine, and fails the jobs that are left."""
        leaves = self._over_ranks or (self.state == "ready" and self._settings.store is not None)
        self.state = "stopped"
        self._fail_all("the server is stopping")
        if self._watching is not None:
            self._watching.cancel()
        if self._engine is not None:
            await self._engine.end(STORING_S + 0.5 if leaves else 0.0)

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
        if self._engine is not None:  # else the next engine gets it at its start
            self._engine.send(job)
        late = asyncio.get_running_loop().call_later(job.timeout_s + LATE_S, self._out_of_time, client)
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
            late.cancel()
            if self._clients.pop(job.id, None) is not None:
                self._cancel(client)

    async def ping(self, timeout_s: float = PING_S) -> Pong | None:
        """The state of the engine; None if it is not running or does not answer in `timeout_s` seconds."""
        if self.state != "ready" or self._engine is None:
            return None
        return await self._engine.ping(timeout_s)

    def _launch(self) -> None:
        """Starts an engine and gives it the waiting jobs."""
        if self.state == "stopped":
            return
        try:
            self._engine = EngineProcess(self._settings, self._receive, self._died)
        except (OSError, RuntimeError) as error:
            return self._failed(f"the engine cannot be started: {error}")
        for client in self._clients.values():
            if not client.started:
                self._engine.send(client.job)

    async def _watch(self) -> None:
        """Kills an engine that hangs."""
        while True:
            await asyncio.sleep(process.TICK_S)
            if (running := self._engine) is None:
                continue
            hang = running.tick()
            if self.state == "ready" and running.silent_s >= SILENT_S:
                self.state = "frozen"
                running.fail_pings()
            if hang is not None:
                LOG.warning("%s; it is killed", hang)
                running.kill()

    def _receive(self, source: EngineProcess, report: Report) -> None:
        if source is not self._engine:
            return
        if isinstance(report, Beat):
            source.beat(report)
            if self.state == "frozen":
                self.state = "ready"
        elif isinstance(report, Pong):
            source.pong(report)
        elif isinstance(report, Notice):
            LOG.warning("%s", report.line)
        elif isinstance(report, Ready):
            self.state, self.longest, self.note, self._failures = "ready", report.longest, report.note, _Failures()
            self._started.set()
        elif isinstance(report, list):
            for event in report:
                self._deliver(event)
        elif not self._started.is_set():  # the first engine: a mistake of the person who starts the server
            self._give_up(report.message)
        else:
            self._engine = None  # its death counts no second time
            source.kill()
            self._failed(report.message)

    def _deliver(self, event: Event) -> None:
        client = self._clients.get(event.job)
        if client is not None and not client.deliver(event):
            self._cancel(client)

    def _out_of_time(self, client: _Client) -> None:
        if not client.ended:
            client.fail(504, f"no answer after {client.job.timeout_s:g} s; the engine does not respond or is busy")
            self._cancel(client)

    def _cancel(self, client: _Client) -> None:
        if self._engine is not None:
            self._engine.send(Cancel(client.job.id))

    def _died(self, source: EngineProcess) -> None:
        """Fails or keeps the jobs of a dead engine."""
        if source is not self._engine or self.state == "stopped":
            return
        self._engine = None
        if self.state in ("ready", "frozen"):  # else it has not read a job yet
            for client in self._clients.values():
                if client.started or client.retried:
                    client.fail(503, "the engine died during this answer and is restarting; ask again")
                client.retried = True
        self.job_ended = self._over_ranks and (self._started.is_set() or source.exit_code == OUR_MISTAKE)
        self._failed(f"the engine died (exit code {source.exit_code})")

    def _failed(self, reason: str) -> None:
        """Starts another engine after a pause, or gives up."""
        if self._over_ranks:  # the other ranks have ended with it
            return self._give_up(f"{reason}, and with it the job of all ranks")
        was_ready = self._started.is_set()
        pause_s = self._failures.pause_s(was_ready)
        if pause_s is None:
            return self._give_up(f"{reason}; {self._failures.count} starts in a row have failed")
        if was_ready:
            self.state = "restarting"
        self.restarts += 1
        LOG.warning("%s; it is started again", reason)
        asyncio.get_running_loop().call_later(pause_s, self._launch)

    def _give_up(self, reason: str) -> None:
        self.state, self._reason = "stopped", reason
        self._fail_all(reason)
        self._given_up.set()
        self._started.set()

    def _fail_all(self, reason: str) -> None:
        for client in self._clients.values():
            client.fail(503, reason)

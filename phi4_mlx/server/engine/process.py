"""One engine process, and the two threads of the server that read from it and write to it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import queue
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from phi4_mlx.server.engine import loop
from phi4_mlx.server.engine.protocol import Beat, Command, Leave, Ping, Pong, Report
from phi4_mlx.server.engine.settings import Settings

TICK_S = 0.5  # the watch counts ticks: after a sleep of the whole machine, one long interval is one tick
FIRST_BEAT_S = 60.0  # from the launch: Python and MLX are imported before the first beat
FROZEN_S = 20.0  # without a beat; beats go on in native code, in a Metal compilation and while weights are read
STALLED_S = 300.0  # for one step: 512 tokens of prefill take about 80 s on two CPU cores, 3 s on an M1
LOADING_S = 1800.0  # for loading the model, which may be on a slow disk or a network


class EngineProcess:
    """A running engine. All public methods must be called in the event loop's thread.

    Args:
        settings: for the engine.
        on_report: called in the event loop with each report of the engine.
        on_death: called in the event loop after the last report, once the process has ended.

    Raises:
        OSError: the process cannot be started, for instance for lack of descriptors or memory.
        RuntimeError: no thread can be started.
    """

    def __init__(
        self,
        settings: Settings,
        on_report: Callable[[EngineProcess, Report], None],
        on_death: Callable[[EngineProcess], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_report, self._on_death = on_report, on_death
        self._outbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()  # None ends the thread that reads it
        self._pongs: dict[int, asyncio.Future[Pong | None]] = {}
        self._numbers = itertools.count(1)
        self._last: Beat | None = None
        self._silent = self._stalled = 0  # ticks
        context = multiprocessing.get_context("spawn")  # forking a process with threads or Metal is unsafe
        self._connection, theirs = context.Pipe()
        with contextlib.ExitStack() as failed, theirs:
            failed.callback(self._connection.close)
            self._process = context.Process(target=loop.run, args=(theirs, settings), daemon=True)
            self._process.start()
            failed.callback(self._process.kill)
            self._reader = threading.Thread(target=self._read, daemon=True)
            writer = threading.Thread(target=_write, args=(self._connection, self._outbox), daemon=True)
            writer.start()
            failed.callback(self._outbox.put, None)
            self._reader.start()
            failed.pop_all()

    @property
    def silent_s(self) -> float:
        """Seconds since the last beat, counted in ticks; 0 before the first one."""
        return self._silent * TICK_S if self._last is not None else 0.0

    @property
    def exit_code(self) -> int | None:
        """The exit code; negative for a signal, None while the process runs."""
        return self._process.exitcode

    def send(self, command: Command) -> None:
        """Sends a command, in a thread, because the engine may be slow to read it."""
        self._outbox.put(command)

    async def ping(self, timeout_s: float) -> Pong | None:
        """The state of the engine; None if it does not answer in `timeout_s` seconds, or is frozen or dead."""
        number = next(self._numbers)
        answer = self._pongs[number] = self._loop.create_future()
        self.send(Ping(number))
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except asyncio.TimeoutError:
            return None
        finally:
            self._pongs.pop(number, None)

    def pong(self, pong: Pong) -> None:
        """Takes the answer to a ping."""
        if (answer := self._pongs.get(pong.number)) is not None and not answer.done():
            answer.set_result(pong)

    def fail_pings(self) -> None:
        """Ends the pings that wait."""
        for answer in self._pongs.values():
            if not answer.done():
                answer.set_result(None)

    def kill(self) -> None:
        """Ends the process, even a stopped one."""
        self._process.kill()

    async def end(self, timeout_s: float) -> None:
        """Ends the process; with a timeout, it is asked first, so that it can store what is in its memory."""
        if timeout_s:
            self.send(Leave())
            await self.ended(timeout_s)
        self.kill()
        await self.ended()

    async def ended(self, timeout_s: float | None = None) -> None:
        """Waits until the process has ended and is reaped, or the time is over."""
        await asyncio.to_thread(self._reader.join, timeout_s)

    def beat(self, beat: Beat) -> None:
        """Takes a sign of life."""
        if beat.waiting or self._last is None or beat.turns != self._last.turns:
            self._stalled = 0
        self._last, self._silent = beat, 0

    def tick(self) -> str | None:
        """Counts a tick; returns one line about a hang, None if there is none."""
        self._silent += 1
        self._stalled += 1
        silent_s, stalled_s = self._silent * TICK_S, self._stalled * TICK_S
        if silent_s > (FIRST_BEAT_S if self._last is None else FROZEN_S):
            hang = f"the engine has given no sign of life for {silent_s:g} s"
        elif stalled_s > (STALLED_S if self._last is not None and self._last.turns else LOADING_S):
            hang = f"the engine has taken {stalled_s:g} s for one step"
        else:
            return None
        self._silent = self._stalled = 0
        return hang

    def _read(self) -> None:
        """A thread: passes the engine's reports to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            try:
                while True:
                    self._loop.call_soon_threadsafe(self._on_report, self, self._connection.recv())
            except (EOFError, OSError):
                self._outbox.put(None)
                self._process.join()
                self._connection.close()
                self._loop.call_soon_threadsafe(self._ended)

    def _ended(self) -> None:
        self.fail_pings()
        self._on_death(self)


def _write(connection: Connection, outbox: queue.SimpleQueue[Command | None]) -> None:
    """A thread: passes commands to the engine."""
    with contextlib.suppress(OSError):
        while (command := outbox.get()) is not None:
            connection.send(command)

"""An engine that does what a job's prompt says, under a real supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from phi4_mlx.server.engine.protocol import Event, Failure, Job, Piece
from phi4_mlx.server.engine.settings import Settings
from phi4_mlx.server.engine.supervisor import Supervisor

HANG_S = 120.0  # a test that takes longer is stuck

# The meanings of a prompt's only token.
ANSWER, HANG, DIE, TELL_AND_DIE, TELL_AND_HANG, DIE_ONCE, DIE_IN_PING, STALL, FLOOD = range(1, 10)

ENGINE = """
import os
import time
from pathlib import Path
from phi4_mlx.server.engine.protocol import Beat, Broken, Cancel, Finish, Job, Piece, Ping, Pong, Ready
from phi4_mlx.server.engine.pulse import Pulse

def run(pipe, settings):
    connection = pipe
    folder = Path(settings.model)
    starts = folder / "starts"
    count = int(starts.read_text()) if starts.exists() else 0
    starts.write_text(str(count + 1))
    how = (folder / "how").read_text().split() if (folder / "how").exists() else []
    if "broken" in how or ("broken-again" in how and count):
        connection.send(Broken("the model is broken"))
        return
    if "dies" in how or ("dies-again" in how and count):
        os._exit(3)
    connection.send(Ready(1000))
    dying, pulse = False, Pulse(connection)
    connection = pulse
    while True:
        pulse.turns, pulse.waiting = pulse.turns + 1, True
        message = pipe.recv()
        pulse.waiting = False
        if isinstance(message, Ping):
            if dying:
                os._exit(5)
            if not (folder / "deaf").exists():
                connection.send(Pong(message.number, {"starts": count + 1}))
        elif isinstance(message, Cancel):
            with (folder / "cancelled").open("a") as file:
                print(message.job, file=file)
        else:
            what, finish = message.prompt[0], Finish(message.id, "stop", None, 1, 0, count + 1)
            if what == 1:
                connection.send([Piece(message.id, "x"), finish])
            elif what == 3 or (what == 6 and not count):
                os._exit(4)
            elif what == 6:
                connection.send([finish])
            elif what in (4, 5):
                connection.send([Piece(message.id, "x")])
                if what == 4:
                    time.sleep(0.1)
                    os._exit(4)
            elif what == 7:
                connection.send([Piece(message.id, "x")])
                dying = True
            elif what == 8:
                time.sleep(1000)
            elif what == 9:
                connection.send([Piece(message.id, "x")] * 20)
"""


def job(what: int) -> Job:
    return Job(0, (what,), 5)


async def events(supervisor: Supervisor, what: int) -> list[Event]:
    return [event async for event in supervisor.events(job(what))]


async def started(folder: Path, max_jobs: int = 4) -> Supervisor:
    supervisor = Supervisor(Settings(str(folder)), max_jobs)
    await supervisor.start()
    return supervisor


def supervised(test: Callable[[Supervisor], Awaitable[None]], folder: Path, **options: Any) -> None:
    async def main() -> None:
        supervisor = await started(folder, **options)
        try:
            await asyncio.wait_for(test(supervisor), HANG_S)
        finally:
            await supervisor.stop()

    asyncio.run(main())


async def until(what: Callable[[], bool]) -> None:
    """Waits; the limit of the whole test guards against a hang."""
    while not what():
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def begun(supervisor: Supervisor, asked: Job) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of a job after its first one."""
    async with contextlib.aclosing(supervisor.events(asked)) as told:
        assert isinstance(await anext(told), Piece)
        yield told


def engine_process() -> BaseProcess:
    (process,) = multiprocessing.active_children()
    return process


def signal_engine(number: signal.Signals) -> None:
    pid = engine_process().pid
    assert pid is not None
    os.kill(pid, number)


def starts(folder: Path) -> int:
    return int((folder / "starts").read_text())


def failure(told: list[Event]) -> Failure:
    assert isinstance(told[-1], Failure), told
    return told[-1]

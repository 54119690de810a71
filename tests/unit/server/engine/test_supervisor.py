"""The engine's keeper: an engine that dies is started again, and whoever waits is told the truth.

Most tests put a script in the engine's place, which does what a job's prompt says; the last ones run the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.errors import Phi4Error
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.engine import supervisor as supervisor_module
from phi4_mlx.server.engine.engine import Settings
from phi4_mlx.server.engine.protocol import Event, Failure, Finish, Job, Piece, Pong
from phi4_mlx.server.engine.supervisor import Full, Supervisor

ANSWER, HANG, DIE, TELL_AND_DIE, TELL_AND_HANG, DIE_ONCE = range(1, 7)  # what a prompt's only token asks for
DIE_IN_PING = 7

ENGINE = """
import os
import time
from pathlib import Path
from phi4_mlx.server.engine.protocol import Broken, Cancel, Finish, Job, Piece, Ping, Pong, Ready

def run(connection, settings):
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
    dying = False
    while True:
        message = connection.recv()
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
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of an engine that does what prompts say; `how` in it says how it starts."""
    name = f"scripted_engine_{tmp_path.name}".replace("-", "_").replace("[", "_").replace("]", "_")
    (tmp_path / f"{name}.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(supervisor_module.engine, "run", importlib.import_module(name).run)
    monkeypatch.setattr(supervisor_module, "PAUSES_S", (0.0, 0.01, 0.02))
    return tmp_path


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
            await asyncio.wait_for(test(supervisor), 30)
        finally:
            await supervisor.stop()

    asyncio.run(main())


async def until(what: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def starts(folder: Path) -> int:
    return int((folder / "starts").read_text())


def failure(told: list[Event]) -> Failure:
    assert isinstance(told[-1], Failure), told
    return told[-1]


def test_jobs_are_answered_under_numbers_of_their_own(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        assert (supervisor.state, supervisor.longest, supervisor.restarts) == ("ready", 1000, 0)
        told = await asyncio.gather(*(events(supervisor, ANSWER) for _ in range(3)))
        assert len({each[0].job for each in told}) == 3
        assert all(len({event.job for event in each}) == 1 for each in told)
        assert supervisor.jobs == 0

    supervised(test, folder)


def test_an_engine_that_dies_is_started_again_and_who_was_told_nothing_is_answered(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        states: list[str] = []
        under_way = asyncio.create_task(events(supervisor, TELL_AND_HANG))
        untold = asyncio.create_task(events(supervisor, DIE_ONCE))
        states.append(supervisor.state)
        failed = failure(await under_way)
        assert failed.status == 503 and "ask again" in failed.message
        states.append(supervisor.state)
        assert await supervisor.ping() is None  # at once, not after a wait
        again = asyncio.create_task(events(supervisor, ANSWER))  # while it is not there
        told = await untold
        assert isinstance(told[-1], Finish) and told[-1].answer_tokens == 2  # by the second engine
        assert isinstance((await again)[-1], Finish)
        states.append(supervisor.state)
        assert states == ["ready", "restarting", "ready"] and supervisor.restarts == 1 == starts(folder) - 1
        assert supervisor.jobs == 0

    supervised(test, folder)


def test_who_was_told_something_is_not_begun_again_however_slow_to_listen(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        async with contextlib.aclosing(supervisor.events(job(TELL_AND_DIE))) as slow:
            assert isinstance(await anext(slow), Piece)
            await until(lambda: supervisor.restarts == 1 and supervisor.state == "ready")
            assert isinstance((await events(supervisor, ANSWER))[-1], Finish)
            await asyncio.sleep(0.3)
            assert supervisor.restarts == 1
            assert isinstance(await anext(slow), Failure)

    supervised(test, folder)


def test_a_job_that_kills_twice_is_given_up_and_the_others_go_on(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        assert failure(await events(supervisor, DIE)).status == 503
        assert supervisor.restarts == 2
        assert isinstance((await events(supervisor, ANSWER))[-1], Finish)

    supervised(test, folder)


def test_a_killed_engine_is_replaced(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        waiting = [
            asyncio.create_task(events(supervisor, HANG)),
            asyncio.create_task(events(supervisor, TELL_AND_HANG)),
        ]
        await asyncio.sleep(0.2)
        os.kill(supervisor._process.pid, signal.SIGKILL)
        assert failure(await waiting[1]).status == 503
        await until(lambda: supervisor.state == "ready")
        assert isinstance((await events(supervisor, ANSWER))[-1], Finish)
        assert not waiting[0].done()  # the new one has it
        waiting[0].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting[0]
        await until(lambda: (folder / "cancelled").exists())

    supervised(test, folder)


@pytest.mark.parametrize(
    ("how", "message"), [("dies", "ended 4 times (last with 3)"), ("broken", "the model is broken")]
)
def test_an_engine_that_cannot_start_is_given_up_with_one_line(folder: Path, how: str, message: str) -> None:
    (folder / "how").write_text(how)
    with pytest.raises(Phi4Error, match=message.replace("(", r"\(").replace(")", r"\)")) as raised:
        asyncio.run(started(folder))
    assert "\n" not in str(raised.value)
    assert starts(folder) == (4 if how == "dies" else 1)


@pytest.mark.parametrize("how", ["dies-again", "broken-again"])
def test_an_engine_that_does_not_come_back_fails_whoever_waits(folder: Path, how: str) -> None:
    async def test(supervisor: Supervisor) -> None:
        (folder / "how").write_text(how)
        waiting = asyncio.create_task(events(supervisor, HANG))
        await asyncio.sleep(0.05)
        os.kill(supervisor._process.pid, signal.SIGKILL)
        assert failure(await waiting).status == 503
        await until(lambda: supervisor.state == "stopped")
        assert await supervisor.ping() is None
        assert failure(await asyncio.wait_for(events(supervisor, ANSWER), 1)).status == 503  # and nobody waits in vain

    supervised(test, folder)


def test_there_are_never_more_jobs_than_may_be(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        waiting = [asyncio.create_task(events(supervisor, HANG)) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(Full):
            await events(supervisor, ANSWER)
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        assert isinstance((await events(supervisor, ANSWER))[-1], Finish)
        waiting[1].cancel()

    supervised(test, folder, max_jobs=2)


def test_a_ping_is_answered_and_does_not_wait_for_the_dead(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        assert await supervisor.ping() == Pong(1, {"starts": 1})
        (folder / "deaf").touch()
        before = time.monotonic()
        assert await supervisor.ping(timeout_s=0.1) is None and supervisor.state == "ready"  # busy, for all we know
        waiting = asyncio.create_task(supervisor.ping())
        hanging = asyncio.create_task(events(supervisor, DIE_IN_PING))
        await asyncio.sleep(0.05)
        (folder / "deaf").unlink()
        assert await supervisor.ping() is None and await waiting is None  # it dies of the question
        assert time.monotonic() - before < 5
        await until(lambda: supervisor.state == "ready")
        assert failure(await hanging).status == 503
        pong = await supervisor.ping()
        assert pong is not None and pong.gauges == {"starts": 2} and not supervisor._pongs

    supervised(test, folder)


def test_whoever_waits_for_a_ping_can_be_cancelled(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        (folder / "deaf").touch()
        waiting = asyncio.create_task(supervisor.ping())
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    supervised(test, folder)


def test_what_a_dead_engine_had_said_is_not_the_new_ones(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        old = supervisor._process
        waiting = asyncio.create_task(events(supervisor, HANG))
        await asyncio.sleep(0.05)
        os.kill(old.pid, signal.SIGKILL)
        await until(lambda: supervisor.restarts == 1 and supervisor.state == "ready")
        (number,) = supervisor._clients
        supervisor._receive(old, [Piece(number, "of the dead")])
        supervisor._died(old)
        await asyncio.sleep(0.05)
        assert not waiting.done() and supervisor.restarts == 1
        assert not supervisor._clients[number].told
        waiting.cancel()

    supervised(test, folder)


def test_a_client_that_leaves_cancels_its_job_once(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        async with contextlib.aclosing(supervisor.events(job(TELL_AND_HANG))) as told:
            async for event in told:
                number = event.job
                break
        assert isinstance((await events(supervisor, ANSWER))[-1], Finish)
        assert await supervisor.ping() is not None  # all that was said before has been heard
        assert (folder / "cancelled").read_text() == f"{number}\n"  # and none for those that have ended
        assert supervisor.jobs == 0

    supervised(test, folder)


def test_stopping_lets_answers_end_and_fails_the_rest(folder: Path) -> None:
    async def main() -> None:
        supervisor = await started(folder)
        waiting = asyncio.create_task(events(supervisor, HANG))
        await asyncio.sleep(0.05)
        before = time.monotonic()
        await supervisor.stop(grace_s=0.3)
        assert 0.3 <= time.monotonic() - before < 3
        assert failure(await waiting).status == 503 and supervisor.state == "stopped"
        assert not supervisor._process.is_alive()
        await asyncio.sleep(0.1)
        assert supervisor.restarts == 0 and starts(folder) == 1

    asyncio.run(main())


def test_the_real_engine_killed_amid_its_work_is_back_within_five_seconds() -> None:
    settings = Settings("demo", kv_limit_bytes=2**26, prefix_limit_bytes=2**24, max_rows=1)
    endless = Job(0, tuple(range(50, 80)), 2000, Sampling(temp=0.0, logit_bias={1003: -100.0, 1000: -100.0}))

    async def main() -> None:
        supervisor = Supervisor(settings, 8)
        await supervisor.start()
        try:
            under_way = asyncio.create_task(collect(supervisor, endless))
            queued = asyncio.create_task(collect(supervisor, Job(0, (60, 61, 62), 3)))
            await until(lambda: any(client.told for client in supervisor._clients.values()))
            os.kill(supervisor._process.pid, signal.SIGKILL)
            killed = time.monotonic()
            assert failure(await under_way).status == 503
            assert isinstance((await queued)[-1], Finish)
            assert isinstance((await collect(supervisor, Job(0, (60, 61, 62), 3)))[-1], Finish)
            assert time.monotonic() - killed < 5
            # Signals that a terminal or a service manager sends to all processes are for the server to obey.
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(supervisor._process.pid, number)
            assert isinstance((await collect(supervisor, Job(0, (60, 61, 62), 3)))[-1], Finish)
            assert supervisor.restarts == 1
        finally:
            await supervisor.stop()

    async def collect(supervisor: Supervisor, asked: Job) -> list[Event]:
        return [event async for event in supervisor.events(asked)]

    asyncio.run(main())

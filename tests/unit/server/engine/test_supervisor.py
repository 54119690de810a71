"""The supervisor: an engine that dies is restarted, and every job ends with an answer or an honest failure.

Most tests replace the engine by a script that does what a job's prompt says; the last one runs the real engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.errors import Phi4Error
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.engine.protocol import Failure, Finish, Job, Piece, Pong
from phi4_mlx.server.engine.settings import Settings
from phi4_mlx.server.engine.supervisor import Full, Supervisor
from tests.unit.server.engine.scripted import (
    ANSWER,
    DIE,
    DIE_IN_PING,
    DIE_ONCE,
    HANG,
    HANG_S,
    TELL_AND_DIE,
    TELL_AND_HANG,
    begun,
    events,
    failure,
    job,
    signal_engine,
    started,
    starts,
    supervised,
    until,
)


def test_jobs_are_answered_under_numbers_of_their_own(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        assert (supervisor.state, supervisor.longest, supervisor.restarts) == ("ready", 1000, 0)
        told = await asyncio.gather(*(events(supervisor, ANSWER) for _ in range(3)))
        assert len({each[0].job for each in told}) == 3
        assert all(len({event.job for event in each}) == 1 for each in told)
        assert supervisor.jobs == 0

    supervised(test, folder)


def test_a_dead_engine_is_restarted_and_jobs_without_events_are_answered(folder: Path) -> None:
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


def test_a_job_with_an_event_is_not_retried_however_slow_its_client(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        async with begun(supervisor, job(TELL_AND_DIE)) as slow:
            await until(lambda: supervisor.restarts == 1 and supervisor.state == "ready")
            # Given again, it would kill the second engine before that one reads the next job.
            assert isinstance((await events(supervisor, ANSWER))[-1], Finish)
            assert supervisor.restarts == 1
            assert isinstance(await anext(slow), Failure)

    supervised(test, folder)


def test_a_job_that_kills_two_engines_fails_and_the_others_continue(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        assert failure(await events(supervisor, DIE)).status == 503
        assert supervisor.restarts == 2
        assert isinstance((await events(supervisor, ANSWER))[-1], Finish)

    supervised(test, folder)


def test_a_killed_engine_is_replaced(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        waiting = asyncio.create_task(events(supervisor, HANG))
        await until(lambda: supervisor.jobs == 1)
        async with begun(supervisor, job(TELL_AND_HANG)) as told:
            signal_engine(signal.SIGKILL)
            assert failure([await anext(told)]).status == 503
        await until(lambda: supervisor.state == "ready")
        assert isinstance((await events(supervisor, ANSWER))[-1], Finish)
        assert not waiting.done()  # the second engine has it
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        await until(lambda: (folder / "cancelled").exists())

    supervised(test, folder)


@pytest.mark.parametrize(
    ("how", "message"), [("dies", "died (exit code 3); 4 starts in a row"), ("broken", "the model is broken")]
)
def test_an_engine_that_cannot_start_is_an_error_of_one_line(folder: Path, how: str, message: str) -> None:
    (folder / "how").write_text(how)
    with pytest.raises(Phi4Error, match=message.replace("(", r"\(").replace(")", r"\)")) as raised:
        asyncio.run(started(folder))
    assert "\n" not in str(raised.value)
    assert starts(folder) == (4 if how == "dies" else 1)


@pytest.mark.parametrize("how", ["dies-again", "broken-again"])
def test_an_engine_that_cannot_restart_fails_all_jobs(folder: Path, how: str) -> None:
    async def test(supervisor: Supervisor) -> None:
        (folder / "how").write_text(how)
        waiting = asyncio.create_task(events(supervisor, HANG))
        await until(lambda: supervisor.jobs == 1)
        signal_engine(signal.SIGKILL)
        assert failure(await waiting).status == 503
        await until(lambda: supervisor.state == "stopped")
        assert await supervisor.ping() is None
        assert failure(await events(supervisor, ANSWER)).status == 503  # a later job does not wait for ever

    supervised(test, folder)


def test_jobs_have_a_limit(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        waiting = [asyncio.create_task(events(supervisor, HANG)) for _ in range(2)]
        await until(lambda: supervisor.jobs == 2)
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
        assert await supervisor.ping(timeout_s=0.1) is None and supervisor.state == "ready"  # it may only be busy
        waiting = asyncio.create_task(supervisor.ping(timeout_s=10 * HANG_S))
        await asyncio.sleep(0)  # the ping is sent
        async with begun(supervisor, job(DIE_IN_PING)) as hanging:
            (folder / "deaf").unlink()
            # The engine dies of this ping; neither waits for its time limit.
            assert await supervisor.ping(timeout_s=10 * HANG_S) is None and await waiting is None
            await until(lambda: supervisor.state == "ready")
            assert failure([await anext(hanging)]).status == 503
        pong = await supervisor.ping()
        assert pong is not None and pong.gauges == {"starts": 2}

    supervised(test, folder)


def test_a_ping_can_be_cancelled(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        (folder / "deaf").touch()
        waiting = asyncio.create_task(supervisor.ping())
        await asyncio.sleep(0)  # the ping is sent
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    supervised(test, folder)


def test_late_reports_of_a_dead_engine_are_ignored(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        old: Any = supervisor._engine
        waiting = asyncio.create_task(events(supervisor, HANG))
        await until(lambda: supervisor.jobs == 1)
        signal_engine(signal.SIGKILL)
        await until(lambda: supervisor.restarts == 1 and supervisor.state == "ready")
        (number,) = supervisor._clients
        supervisor._receive(old, [Piece(number, "late")])
        supervisor._died(old)
        await asyncio.sleep(0.05)
        assert not waiting.done() and supervisor.restarts == 1
        assert not supervisor._clients[number].started
        waiting.cancel()

    supervised(test, folder)


def test_a_client_that_disconnects_cancels_its_job_once(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        async with contextlib.aclosing(supervisor.events(job(TELL_AND_HANG))) as told:
            async for event in told:
                number = event.job
                break
        assert isinstance((await events(supervisor, ANSWER))[-1], Finish)
        assert await supervisor.ping() is not None  # so the engine has read all earlier commands
        assert (folder / "cancelled").read_text() == f"{number}\n"  # and none for a job that has ended
        assert supervisor.jobs == 0

    supervised(test, folder)


def test_stopping_fails_the_answers_that_are_left(folder: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        waiting = asyncio.create_task(events(supervisor, HANG))
        await until(lambda: supervisor.jobs == 1)
        await supervisor.stop()
        assert failure(await waiting).status == 503 and supervisor.state == "stopped"
        await until(lambda: not multiprocessing.active_children())
        await asyncio.sleep(0.1)
        assert supervisor.restarts == 0 and starts(folder) == 1

    supervised(test, folder)


def test_the_real_engine_is_back_after_a_kill_as_fast_as_it_started() -> None:
    settings = Settings("demo", kv_limit_bytes=2**26, prefix_limit_bytes=2**24, max_rows=1)
    endless = Job(0, tuple(range(50, 80)), 2000, Sampling(temp=0.0, logit_bias={1003: -100.0, 1000: -100.0}))
    short = Job(0, (60, 61, 62), 3)

    async def answered(supervisor: Supervisor, asked: Job) -> bool:
        return isinstance([event async for event in supervisor.events(asked)][-1], Finish)

    async def test() -> None:
        supervisor = Supervisor(settings, 8)
        before = time.monotonic()
        await supervisor.start()
        assert await answered(supervisor, short)
        first = time.monotonic() - before
        try:
            async with begun(supervisor, endless) as under_way:
                queued = asyncio.create_task(answered(supervisor, short))
                await until(lambda: supervisor.jobs == 2)
                before = time.monotonic()
                signal_engine(signal.SIGKILL)
                assert failure([event async for event in under_way]).status == 503
                assert await queued and await answered(supervisor, short)
                assert time.monotonic() - before < 5 * first  # no pause before the first restart
            # Terminals and service managers send these to all processes; only the server obeys.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal_engine(number)
            assert await answered(supervisor, short)
            assert supervisor.restarts == 1
        finally:
            await supervisor.stop()

    asyncio.run(asyncio.wait_for(test(), HANG_S))

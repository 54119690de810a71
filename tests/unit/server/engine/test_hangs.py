"""Engines that freeze, hang or cannot be started, and clients that do not read their answers."""

from __future__ import annotations

import asyncio
import errno
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.server.engine import process as process_module
from phi4_mlx.server.engine import supervisor as supervisor_module
from phi4_mlx.server.engine.protocol import Failure, Finish, Piece
from phi4_mlx.server.engine.supervisor import Supervisor
from tests.unit.server.engine.scripted import (
    ANSWER,
    FLOOD,
    HANG,
    STALL,
    TELL_AND_HANG,
    begun,
    events,
    failure,
    job,
    signal_engine,
    starts,
    supervised,
    until,
)


@pytest.mark.slow
def test_a_frozen_engine_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "FROZEN_S", 3.0)
    monkeypatch.setattr(supervisor_module, "SILENT_S", 2.0)

    async def test(supervisor: Supervisor) -> None:
        async with begun(supervisor, job(TELL_AND_HANG)) as told:
            signal_engine(signal.SIGSTOP)
            waiting = asyncio.create_task(events(supervisor, ANSWER))
            await until(lambda: supervisor.state == "frozen")
            assert await supervisor.ping() is None  # at once
            assert failure([await anext(told)]).status == 503
        assert isinstance((await waiting)[-1], Finish)  # by the second engine
        assert (supervisor.state, supervisor.restarts, starts(folder)) == ("ready", 1, 2)

    supervised(test, folder)


@pytest.mark.slow
def test_an_engine_that_is_stopped_and_continued_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suspended machine stops the server too: its clock jumps, and the watch sees one tick."""
    monkeypatch.setattr(process_module, "FROZEN_S", 2.0)

    async def test(supervisor: Supervisor) -> None:
        assert isinstance((await events(supervisor, ANSWER))[-1], Finish)
        signal_engine(signal.SIGSTOP)
        time.sleep(5.0)  # the event loop is stopped as well
        signal_engine(signal.SIGCONT)
        assert isinstance((await events(supervisor, ANSWER))[-1], Finish)
        assert supervisor.restarts == 0

    supervised(test, folder)


@pytest.mark.slow
def test_an_engine_that_hangs_in_a_step_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "STALLED_S", 1.0)
    monkeypatch.setattr(process_module, "FROZEN_S", 60.0)

    async def test(supervisor: Supervisor) -> None:
        await asyncio.sleep(3.0)
        assert supervisor.restarts == 0  # an idle engine takes no steps
        assert failure(await events(supervisor, STALL)).status == 503  # a second engine hangs as well
        assert supervisor.restarts == 2
        assert isinstance((await events(supervisor, ANSWER))[-1], Finish)

    supervised(test, folder)


class NoProcess:
    """Stands in for multiprocessing: a process cannot be started `times` times."""

    def __init__(self, times: float, error: type[Exception] = OSError) -> None:
        self.times, self.error, self.asked = times, error, 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        make: Callable[..., Any] = process_module.multiprocessing.get_context

        def get_context(method: str) -> Any:
            self.asked += 1
            if self.asked <= self.times:
                raise self.error(errno.EMFILE, "Too many open files")
            return make(method)

        monkeypatch.setattr(process_module.multiprocessing, "get_context", get_context)


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_start_that_fails_is_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr(supervisor_module, "RESTART_S", 60.0)

    async def test(supervisor: Supervisor) -> None:
        missing = NoProcess(6, error)  # more often than there are pauses
        missing.install(monkeypatch)
        signal_engine(signal.SIGKILL)
        await until(lambda: supervisor.state == "restarting")
        assert isinstance((await events(supervisor, ANSWER))[-1], Finish)  # the job has not failed meanwhile
        assert missing.asked == 7 and starts(folder) == 2 and supervisor.restarts == 7

    supervised(test, folder)


def test_starts_that_always_fail_end_the_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(supervisor: Supervisor) -> None:
        lost = asyncio.create_task(supervisor.lost())
        waiting = asyncio.create_task(events(supervisor, HANG))
        await until(lambda: supervisor.jobs == 1)
        NoProcess(float("inf")).install(monkeypatch)
        assert not lost.done()
        signal_engine(signal.SIGKILL)
        reason = await lost
        assert "Too many open files" in reason and "\n" not in reason
        assert failure(await waiting).status == 503 and failure(await events(supervisor, ANSWER)).status == 503

    supervised(test, folder)


def test_a_model_that_cannot_be_loaded_for_a_while_is_loaded_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "RESTART_S", 60.0)

    async def test(supervisor: Supervisor) -> None:
        (folder / "how").write_text("broken-again")
        waiting = asyncio.create_task(events(supervisor, ANSWER))
        signal_engine(signal.SIGKILL)
        await until(lambda: supervisor.restarts >= 6)
        assert supervisor.state == "restarting"
        (folder / "how").unlink()
        assert isinstance((await waiting)[-1], Finish)

    supervised(test, folder)


def test_a_time_limit_holds_without_the_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "LATE_S", 0.1)

    async def test(supervisor: Supervisor) -> None:
        told = [event async for event in supervisor.events(replace(job(HANG), timeout_s=0.2))]
        assert len(told) == 1 and failure(told).status == 504 and "0.2 s" in failure(told).message
        assert supervisor.jobs == 0
        await until(lambda: (folder / "cancelled").exists())
        signal_engine(signal.SIGSTOP)
        told = [event async for event in supervisor.events(replace(job(ANSWER), timeout_s=0.2))]
        assert failure(told).status == 504
        signal_engine(signal.SIGCONT)

    supervised(test, folder)


def test_a_client_that_does_not_read_loses_its_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "EVENTS_LIMIT", 5)

    async def test(supervisor: Supervisor) -> None:
        async with begun(supervisor, job(FLOOD)) as told:
            await until(lambda: (folder / "cancelled").exists())
            assert supervisor.jobs == 1  # until the client is gone
            rest = [event async for event in told]
        assert len(rest) <= 6 and all(isinstance(event, Piece) for event in rest[:-1])
        assert isinstance(rest[-1], Failure) and "unread" in rest[-1].message
        assert supervisor.jobs == 0 and len((folder / "cancelled").read_text().split()) == 1
        assert isinstance((await events(supervisor, ANSWER))[-1], Finish)

    supervised(test, folder)

"""Jobs of two ranks that end, in order or not: every rank ends, says one line that names the rank, and exits not 0."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rank_jobs import Job

pytestmark = pytest.mark.slow

GENEROUS_S = 90.0  # the watchers need 10 s at most where the cores are free
COURSE = {"STEPS": "20", "IDLE_S": "200", "PHI4_MLX_JOIN_S": "120"}
BY_HAND, LAUNCHER = False, True

Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a job of two ranks."""
    jobs = []

    def job(launcher: bool = BY_HAND, absent: int | None = None, **environment: str) -> Job:
        jobs.append(Job(tmp_path / str(len(jobs)), 2, launcher, absent, **COURSE | environment))
        return jobs[-1]

    yield job
    for each in jobs:
        each.close()


def check_end(job: Job, line: str, ranks: tuple[int, ...] = (0, 1)) -> None:
    """Every rank has ended with one line, and not with 0."""
    assert job.wait([0, 1], GENEROUS_S), [job.lines(rank) for rank in (0, 1)]
    for rank in ranks:
        (said,) = job.lines(rank)
        assert line in said
        assert job.code(rank) != 0


@pytest.mark.parametrize("launcher", [BY_HAND, LAUNCHER])
def test_an_ordinary_end_is_silent(start: Start, launcher: bool) -> None:
    job = start(launcher, IDLE_S="0")
    assert job.wait([0, 1], GENEROUS_S)
    for rank in (0, 1):
        assert job.lines(rank) == [] and job.code(rank) in (0, None)
    assert "exited with code" not in job.launched()


@pytest.mark.parametrize("launcher", [BY_HAND, LAUNCHER])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("failure", "said"), [("killed", "has ended"), ("frozen", "is frozen")])
def test_a_rank_that_fails_ends_the_job(start: Start, launcher: bool, victim: int, failure: str, said: str) -> None:
    job = start(launcher, STEPS="100000" if victim else "20")  # within collectives, and idle
    job.wait_for(range(2), "joined")
    job.fail(failure, victim)
    check_end(job, f"rank {victim} (127.0.0.1) {said}", (1 - victim,))


def test_a_rank_that_is_not_heard_ends_the_job(start: Start) -> None:
    job = start(PROXIED="1")
    job.wait_for(range(2), "joined")
    job.fail("unplugged", 1)
    check_end(job, "has not been heard for 6 s")
    assert "rank 1 (127.0.0.1)" in job.lines(0)[0] and "rank 0 (127.0.0.1)" in job.lines(1)[0]


@pytest.mark.parametrize(("absent", "said"), [(0, "does not answer"), (1, "did not come within 2 s")])
def test_a_rank_that_never_starts_ends_the_job(start: Start, absent: int, said: str) -> None:
    job = start(absent=absent, PHI4_MLX_JOIN_S="2")
    assert job.wait([1 - absent], GENEROUS_S)
    (line,) = job.lines(1 - absent)
    assert f"rank {absent} (127.0.0.1) {said}" in line and job.code(1 - absent) == 2


def test_a_rank_with_another_option_is_refused_on_all(start: Start) -> None:
    job = start(OPTION_1="other")
    check_end(job, "the option is same on rank 0 (127.0.0.1) but other on rank 1 (127.0.0.1)")


def test_an_operation_that_does_not_end_ends_the_job(start: Start) -> None:
    check_end(start(STUCK="1"), "rank 1 (127.0.0.1) did not finish operation 5 within 8 s")


def test_a_rank_in_native_code_that_keeps_the_lock_is_ended_too(start: Start) -> None:
    job = start(HOLDS="0")
    job.wait_for(range(2), "joined")
    job.fail("killed", 1)
    check_end(job, "rank 1 (127.0.0.1) has ended", (0,))
    assert job.code(0) == -signal.SIGKILL


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_freezes_while_the_backend_opens_ends_the_job(start: Start, victim: int) -> None:
    check_end(start(STOPS=str(victim)), f"rank {victim} (127.0.0.1) is frozen", (1 - victim,))


def test_an_error_on_the_leader_ends_the_job_with_its_message(start: Start) -> None:
    check_end(start(IDLE_S="0", ERROR="no such thing"), "rank 0 (127.0.0.1): no such thing; the job ends")


def test_an_interrupt_on_the_leader_ends_the_job(start: Start) -> None:
    job = start()
    job.wait_for(range(2), "joined")
    process = job.process(0)
    assert process is not None
    os.kill(process, signal.SIGINT)
    check_end(job, "rank 0 (127.0.0.1) was interrupted")


def test_an_idle_job_goes_on(start: Start) -> None:
    job = start(IDLE_S="10")  # longer than every limit
    assert job.wait([0, 1], GENEROUS_S)
    assert [job.lines(rank) for rank in (0, 1)] == [[], []] and [job.code(rank) for rank in (0, 1)] == [0, 0]

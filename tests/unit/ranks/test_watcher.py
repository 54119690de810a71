"""The limits of the watcher. What it does to processes is in tests/e2e/test_ranks_failures.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from phi4_mlx.ranks import watcher
from phi4_mlx.ranks.watcher import AFTER_IDLE_S, FIRST_OPERATION_S, IDLE_S, OPERATION_S, TIMES_LONGER, Progress


def test_an_idle_job_is_never_overdue() -> None:
    progress = Progress()
    assert progress.overdue(10**9) is None
    progress.told(1, 1, 0)
    progress.done(1, 1)
    assert progress.overdue(10**9) is None
    progress.told(2, 1, 10**9)
    assert progress.overdue(10**9 + 1) is None


def test_the_first_operation_and_a_longer_one_may_take_their_time() -> None:
    progress = Progress()
    progress.told(1, 16, 0)
    assert progress.overdue(FIRST_OPERATION_S) is None
    assert progress.overdue(FIRST_OPERATION_S + 1) == (1, FIRST_OPERATION_S)
    progress.done(1, 1)
    progress.told(2, 16, 1)
    assert progress.overdue(1 + OPERATION_S + 0.1) == (2, OPERATION_S)
    progress.done(2, 2)
    progress.told(3, 17, 2)
    assert progress.overdue(2 + FIRST_OPERATION_S) is None


def test_an_operation_after_idle_time_may_read_its_weights_again() -> None:
    progress = Progress()
    progress.told(1, 1, 0)
    progress.done(1, 1)
    progress.told(2, 1, 1 + IDLE_S + 1)
    progress.told(3, 1, 1 + IDLE_S + 1)
    assert progress.limit_s() == AFTER_IDLE_S
    progress.done(2, 1 + IDLE_S + 2)
    assert progress.limit_s() == OPERATION_S


def test_the_limit_grows_with_the_longest_operation() -> None:
    progress = Progress()
    progress.told(1, 512, 0)
    progress.done(1, 100)
    progress.told(2, 1, 100)
    assert progress.limit_s() == TIMES_LONGER * 100
    progress.done(2, 101)
    progress.told(3, 2048, 101)
    assert progress.limit_s() == TIMES_LONGER * 100 * 4


def test_operations_that_wait_for_one_another_are_counted_one_by_one() -> None:
    progress = Progress()
    for counter in range(1, 11):
        progress.told(counter, 1, 0)
    for counter in range(1, 11):
        progress.done(counter, 5.0 * counter)
        assert progress.overdue(5.0 * counter + 5) is None
    assert progress.limit_s() == TIMES_LONGER * 5
    progress.done(10, 10**6)  # again
    assert progress.limit_s() == TIMES_LONGER * 5


def test_time_in_which_the_machine_slept_does_not_count() -> None:
    progress = Progress()
    progress.told(1, 1, 0)
    progress.shift(10_000)
    assert progress.overdue(10_001) is None


def test_a_stopped_process_is_seen() -> None:
    process = subprocess.Popen([sys.executable, "-c", "print('runs', flush=True); input()"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"runs\n"
    assert not watcher._is_stopped(process.pid)
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    assert watcher._is_stopped(process.pid)
    process.kill()
    process.communicate()
    assert not watcher._is_stopped(process.pid)


def test_the_watcher_needs_the_standard_library_alone() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(Path(watcher.__file__))],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert set(done.stdout.split()) - {"__main__"} <= {*sys.stdlib_module_names, *sys.builtin_module_names}, done.stderr


def test_limits_leave_room_in_ten_seconds() -> None:
    assert watcher.SILENT_S + 2 * watcher.BEAT_S + 1 < 10 and watcher.FROZEN_S < watcher.SILENT_S


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_state_without_proc_is_read_by_ps(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise FileNotFoundError

    said = []

    def ps(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        said.append(command)
        return subprocess.CompletedProcess(command, 0, b"T+\n")

    monkeypatch.setattr("builtins.open", missing)
    monkeypatch.setattr(watcher.subprocess, "run", ps)
    assert watcher._is_stopped(17) and said == [["ps", "-o", "stat=", "-p", "17"]]

"""An evaluation that is killed at 20 moments goes on each time, and ends as one that was never killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TinyCheckpoint

SCRIPT = Path(__file__).with_name("killed_run.py")


def run(model: Path, file: Path, moment: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(model), str(file), str(moment)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


def keys(file: Path) -> list[str]:
    """The keys of the whole lines of a file of answers."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [json.loads(line)["key"] for line in lines]


@pytest.mark.slow
def test_a_run_killed_at_20_moments_asks_nothing_twice(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    model, file = tiny_checkpoint(), tmp_path / "answers.jsonl"
    whole = run(model, tmp_path / "whole.jsonl", 0)
    assert whole.returncode == 0, whole.stderr
    before: list[str] = []
    for moment in [1, 2, 3, 4] * 5:
        done = run(model, file, moment)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert keys(file)[: len(before)] == before  # what is written stays, in its place
        before = keys(file)
        assert len({*before}) == len(before)
    (scores, texts), (expected, same) = (json.loads(each.stdout) for each in (run(model, file, 0), whole))
    assert texts == same
    assert [score["greedy"] for score in scores] == [score["greedy"] for score in expected]
    logprobs = [score["logprob"] for score in expected]
    assert [score["logprob"] for score in scores] == pytest.approx(logprobs, rel=0, abs=1e-5)
    assert sorted(keys(file)) == sorted(keys(tmp_path / "whole.jsonl")) and len(keys(file)) == 24

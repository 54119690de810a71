"""Two processes of MLX's ring share the work out, and both have all of its results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.sharing import other_answers
from tests.conftest import ROOT

SCRIPT = Path(__file__).with_name("shared_run.py")


def run(folder: Path, manner: str = "", processes: int = 2) -> list[dict[str, Any]]:
    """The output of each process, by rank."""
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", str(processes), "--backend", "ring"]
    words = ["--env", f"PYTHONPATH={ROOT}", "--", sys.executable, str(SCRIPT), str(folder), *manner.split()]
    command = [*launch, *words] if processes > 1 else words[3:]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted(map(json.loads, lines), key=lambda result: result["rank"])


@pytest.mark.slow
def test_two_processes_share_the_work_and_have_all_results(tmp_path: Path) -> None:
    (alone,) = run(tmp_path / "alone", processes=1)
    first, second = run(tmp_path / "two")
    assert first["texts"] == second["texts"] == alone["texts"]
    assert first["scores"] == second["scores"]
    logprobs = [[score["logprob"] for score in result["scores"]] for result in (alone, first)]
    assert logprobs[1] == pytest.approx(logprobs[0], abs=1e-4)
    assert first["own"] + second["own"] == alone["own"] == 17
    assert min(first["own"], second["own"]) >= 7  # about half of the scores, and of the answers
    keys = [json.loads(line)["key"] for path in (tmp_path / "two").iterdir() for line in path.read_text().splitlines()]
    assert len({*keys}) == len(keys) == 17

    (tmp_path / "two" / "task-1.jsonl").write_text("")  # as if the second had been stopped before its first answer
    again = run(tmp_path / "two")
    assert [each["texts"] for each in again] == [alone["texts"]] * 2
    assert all(each["passes"] > 0 for each in again)
    assert [each["passes"] for each in run(tmp_path / "two")] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("manner", "messages"),
    [
        ("fail", ["process 1 of 2 has failed: the disk is full", "the disk is full"]),
        ("differ", ["process 1 of 2 has other questions", "process 0 of 2 has other questions"]),
    ],
)
def test_a_process_that_fails_ends_the_others(tmp_path: Path, manner: str, messages: list[str]) -> None:
    for result, message in zip(run(tmp_path, manner), messages, strict=True):
        assert result["error"].startswith(message)


def test_fewer_processes_go_on_with_the_answers_of_more(tmp_path: Path) -> None:
    with Answers(tmp_path / "even-1.jsonl") as answers:
        answers.put("key", "value")
    with (tmp_path / "even-1.jsonl").open("a") as file:
        file.write("torn")
    for name in ("uneven.jsonl", "even-more.jsonl"):
        (tmp_path / name).write_text("of another task")
    own = tmp_path / "even.jsonl"
    with Answers(own, other_answers(own, "even")) as answers:
        assert answers.get("key") == "value"
    assert not own.read_bytes()

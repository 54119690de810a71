"""`evaluate` in a process of its own: killed at several moments, it goes on without asking anything twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 24}}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """An evaluation of a scored and a written task, without its folder."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"what is {number} * {number + 3}?", "answer": number % 2} for number in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, metric in (("scored", "multiple_choice", "acc"), ("written", "generate_until", "exact_match")):
        text = TASK.format(name=name, file=folder / "rows.jsonl", kind=kind, metric=metric)
        (folder / f"{name}.yaml").write_text(text)
    words = ["--tasks", "scored,written", "--include-path", str(folder), "--output-dir"]
    return [sys.executable, "-m", "phi4_mlx", "evaluate", "--model", "demo", *words]


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(folder.parent)}
    return subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def lines(folder: Path) -> list[bytes]:
    """Answers that are on the disk, whole."""
    return [
        line
        for path in sorted((folder / "answers").glob("*.jsonl"))
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]


@pytest.mark.slow
def test_a_killed_run_goes_on_without_asking_twice(command: list[str], tmp_path: Path) -> None:
    whole = start(command, tmp_path / "whole")
    shown, complaint = whole.communicate(timeout=300)
    assert whole.returncode == 0, complaint
    expected = lines(tmp_path / "whole")
    draw, kills = random.Random(2), 0
    for stop in sorted(draw.sample(range(len(expected)), 5)):  # killed once so many answers are on the disk
        process = start(command, tmp_path / "killed")
        while process.poll() is None and len(lines(tmp_path / "killed")) <= stop:
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = start(command, tmp_path / "killed")
    again, complaint = last.communicate(timeout=300)
    assert last.returncode == 0, complaint
    assert kills and again == shown
    keys = [json.loads(line)["key"] for line in lines(tmp_path / "killed")]
    assert len(keys) == len(set(keys)) == len(expected)
    assert {*keys} == {json.loads(line)["key"] for line in expected}
    for name in ("results.md", "results.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

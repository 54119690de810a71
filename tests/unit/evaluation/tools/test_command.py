"""`python -m phi4_mlx evaluate` on the tasks with tools: what is missing is said before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi4_mlx.commands.evaluate import main
from tests.conftest import ROOT

DATA = ROOT / "tests" / "data" / "evaluation" / "tools"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tasks", "bfcl", "--categories", "live,paralel"], "bfcl has no category 'paralel'; did you mean parallel"),
        (["--tasks", "tools"], "the task tools needs --data: a folder with questions.jsonl"),
        (["--tasks", "tools", "--data", str(ROOT / "tests")], "questions.jsonl does not exist"),
    ],
)
def test_what_is_missing_is_one_line(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "/no/such/model", *options, "--output-dir", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not (tmp_path / "out").exists()


def test_options_without_effect_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-shots", "3", "--repeats", "2", "--limit", "1", "--max-tokens", "1"]
    out = ["--output-dir", str(tmp_path / "out")]
    assert main(["--model", "demo", "--tasks", "tools", "--data", str(DATA), *options, *out]) == 0
    said = capsys.readouterr()
    assert "--num-shots has no effect on the package's own tasks" in said.err
    assert "--repeats has no effect on these tasks" in said.err
    assert "| tools | arithmetic | accuracy | 0 | 1 |" in said.out

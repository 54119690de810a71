"""Output for people: a line per step, the remaining time, and a bar on a terminal only."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from phi4_mlx.lora import display
from phi4_mlx.lora.display import duration, progress, step_line, to_stderr
from phi4_mlx.lora.progress import Step
from phi4_mlx.lora.settings import Settings

STEP = Step(1200, 2.5, 1e-4, 3000, 1.0, 2.0, 1_500_000_000)


def test_a_step_in_a_line() -> None:
    assert step_line(STEP, "targets") == "step 1,200: loss 2.500, 1,500 targets/s, 1.50 GB"
    pairs = replace(STEP, tokens=3, accuracy=0.75, margin=0.5, valid_loss=0.25, valid_accuracy=1.0)
    assert step_line(pairs, "pairs") == (
        "step 1,200: loss 2.500, 75% ahead by 0.50, validation 0.250 with 100% ahead, 1.5 pairs/s, 1.50 GB"
    )


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (89, "89 s"), (91, "2 min"), (5300, "88 min"), (5400, "1.5 h")]
)
def test_no_finer_than_it_can_be_known(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_pipe_has_a_line_now_and_then_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a resumed run, which estimates from its own steps only."""
    now = 100.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    told: list[str] = []
    with progress(Settings(steps_per_report=5), 100, 40, told.append) as show:
        for n in range(41, 51):
            now += 60
            show(replace(STEP, step=n, valid_loss=1.0 if n == 42 else None))
    assert [line.partition(":")[0] for line in told] == ["step 42", "step 45", "step 50"]
    assert told[0].endswith(", 58 min left") and told[2].endswith(", 50 min left")


def test_with_several_batches_in_a_step_the_lines_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with progress(Settings(steps_per_report=10), 100, 0, told.append) as show:
        for n in range(4, 44, 4):
            show(replace(STEP, step=n))
    assert [line.partition(":")[0] for line in told] == ["step 12", "step 20", "step 32", "step 40"]


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress(Settings(), 1200, 0, to_stderr) as show:
        show(STEP)
    assert "1200/1200" in capsys.readouterr().err

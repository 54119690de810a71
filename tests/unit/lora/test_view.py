"""The view of a run: a line per step, the remaining time, and a bar on a terminal only."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from phi4_mlx.lora import view as view_module
from phi4_mlx.lora.progress import Step
from phi4_mlx.lora.view import Bar, View, duration, step_line, to_stderr, view_of

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
    monkeypatch.setattr(view_module.time, "monotonic", lambda: now)
    told: list[str] = []
    with view_of(told.append) as view:
        view.begin(40, 100, "targets", 5, 60.0)
        for n in range(41, 51):
            now += 60
            view.step(replace(STEP, step=n, valid_loss=1.0 if n == 42 else None))
    assert [line.partition(":")[0] for line in told] == ["step 42", "step 45", "step 50"]
    assert told[0].endswith(", 58 min left") and told[2].endswith(", 50 min left")


def test_with_several_batches_in_a_step_the_lines_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with view_of(told.append) as view:
        view.begin(0, 100, "targets", 10, None)
        for n in range(4, 44, 4):
            view.step(replace(STEP, step=n))
    assert [line.partition(":")[0] for line in told] == ["step 12", "step 20", "step 32", "step 40"]


def make_bar(monkeypatch: pytest.MonkeyPatch, columns: int) -> Bar:
    """The bar of a terminal, drawn when `texts` is called."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(view_module.Bar, "__enter__", lambda self: self)
    with view_of(to_stderr) as view:
        assert isinstance(view, Bar)
        return view


@pytest.fixture
def bar(monkeypatch: pytest.MonkeyPatch) -> Bar:
    return make_bar(monkeypatch, 80)


def texts(bar: Bar) -> list[str]:
    console = Console(force_terminal=False, record=True, file=io.StringIO())
    console.print(bar)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_a_bar_names_the_phase_then_moves_within_a_step(bar: Bar, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(view_module.time, "monotonic", lambda: now)
    bar.phase("reading the data")
    now += 7
    assert texts(bar)[0].endswith(" reading the data, 7 s")
    bar.begin(0, 60, "targets", 10, 40.0)
    bar.watch("step", 0, 0.25, 60)
    now += 4  # a tenth of what the memory plan expects
    assert "step 1 of 60,  10%" in texts(bar)[0] and texts(bar)[0].endswith("4 s of about 40 s; about 40 min left")
    now += 100  # the next milestone is not reached
    assert "step 1 of 60,  25%" in texts(bar)[0]
    bar.watch("step", 0.25, 0.5, 60)
    assert "step 1 of 60,  25%" in texts(bar)[0]


def test_a_bar_shows_the_last_step_and_leaves_validations_on_the_screen(
    bar: Bar, capsys: pytest.CaptureFixture[str]
) -> None:
    bar.begin(0, 2000, "targets", 10, None)
    bar.watch("step", 1199, 1199.5, 2000)
    bar.step(STEP)
    assert texts(bar)[1] == step_line(STEP, "targets")
    bar.watch("validation", 0, 0.5, 25)
    assert "validation batch 1 of 25" in texts(bar)[0]
    bar.step(replace(STEP, valid_loss=2.0))
    assert len(texts(bar)) == 1 and "validation 2.000" in capsys.readouterr().err


def test_a_message_above_the_bar_is_not_broken(bar: Bar, capsys: pytest.CaptureFixture[str]) -> None:
    """So that a command in it can be copied; and [words] are no markup."""
    command = "chat with it: python -m phi4_mlx chat --model 'a [red] model' --adapter-path " + 30 * "/folder"
    bar.tell(command)
    assert capsys.readouterr().err == command + "\n"


@pytest.mark.parametrize("columns", [20, 40, 60, 79, 120])
def test_a_bar_fits_its_terminal_with_room_for_a_typed_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    bar = make_bar(monkeypatch, columns)
    bar.begin(0, 100_000, "targets", 10, 1000.0)
    bar.watch("step", 12_345.5, 12_345.75, 100_000)
    bar.step(STEP)
    assert all(len(line) <= columns - 4 for line in texts(bar))


def test_without_a_terminal_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with view_of(to_stderr) as view:
        assert type(view) is View
    monkeypatch.setenv("TERM", "xterm")
    with view_of(lambda message: None) as view:
        assert type(view) is View

"""The metrics file survives a cut at any byte, trackers get its lines, and the curves are drawn."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.lora.display import draw_in_terminal, draw_png
from phi4_mlx.lora.progress import Step
from phi4_mlx.lora.saving.metrics import MetricsLog, read_metrics, reporter


def step(n: int, valid: float | None = None) -> Step:
    return Step(n, 3.0 / n, 1e-3, 100, 1.0, 0.5, 10**6, valid)


def test_a_resumed_record_goes_on_behind_its_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for n in range(1, 8):
        log.add(step(n, 2.0 if n % 3 == 0 else None))
    with log.path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a line
    again = MetricsLog(tmp_path, 5)
    again.add(step(6))
    lines = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[2]["valid_loss"] == 2.0 and "valid_loss" not in lines[5]
    assert {"step", "loss", "learning_rate", "tokens", "peak_bytes", "tokens_per_s"} <= lines[0].keys()


def test_a_run_that_begins_anew_keeps_nothing(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0).add(step(1))
    assert read_metrics(MetricsLog(tmp_path, 0).path) == []


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for n in range(1, 30):
        log.add(step(n, 2.0 / n if n % 5 == 0 else None))
    drawn = draw_in_terminal(log, 60)
    lines = drawn.splitlines()
    assert len(lines) == 13 and {len(line) for line in lines[:-1]} == {60}
    assert lines[0].startswith("3.00 ") and lines[11].startswith("0.10 ") and "steps 1 to 29" in lines[12]
    assert lines[0][5] != "\u2800" and lines[11][59] != "\u2800"  # from the top left to the bottom right
    picture = draw_png(log)
    assert picture is not None and picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert draw_png(MetricsLog(tmp_path, 0)) is None


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Makes a library look installed."""
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(__spec__=name, **content))


def test_metrics_go_to_weights_and_biases_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, Any], int]] = []

    def init(**options: Any) -> Any:
        begun.append(options)
        return SimpleNamespace(log=lambda metrics, step: logged.append((metrics, step)))

    install(monkeypatch, "wandb", init=init)
    log = MetricsLog(tmp_path, 0, reporter("wandb", tmp_path, {"iters": 2}))
    log.add(step(1))
    log.add(step(2, 0.5))
    assert begun == [{"dir": str(tmp_path), "config": {"iters": 2}}]
    assert [at for _, at in logged] == [1, 2] and logged[1][0] == log.lines[1]


def test_metrics_go_to_tensorboard_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    writer = SimpleNamespace(add_event=events.append, flush=lambda: None)
    summary = type("Summary", (SimpleNamespace,), {"Value": SimpleNamespace})
    for name, content in {
        "tensorboard": {},
        "tensorboard.compat.proto.event_pb2": {"Event": SimpleNamespace},
        "tensorboard.compat.proto.summary_pb2": {"Summary": summary},
        "tensorboard.summary.writer.event_file_writer": {"EventFileWriter": lambda folder: writer},
    }.items():
        install(monkeypatch, name, **content)
    MetricsLog(tmp_path, 0, reporter("tensorboard", tmp_path, {})).add(step(3, 0.5))
    assert events[0].step == 3
    assert {"loss": 1.0, "valid_loss": 0.5}.items() <= {v.tag: v.simple_value for v in events[0].summary.value}.items()


def test_a_library_that_does_not_begin_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "wandb", init=lambda **options: 1 / 0)
    with pytest.raises(RequestError, match="--report-to wandb: division by zero"):
        reporter("wandb", tmp_path, {})


def test_a_library_that_fails_on_the_way_costs_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(metrics: dict[str, Any], step: int) -> None:
        raise RuntimeError("the network\nis gone")

    install(monkeypatch, "wandb", init=lambda **options: SimpleNamespace(log=failing))
    log = MetricsLog(tmp_path, 0, reporter("wandb", tmp_path, {}))
    with pytest.raises(OSError, match="the network is gone") as caught:
        log.add(step(1))
    assert caught.value.filename == "wandb" and [line["step"] for line in read_metrics(log.path)] == [1]


def test_pairs_are_called_pairs(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, noun="pairs")
    log.add(replace(step(1), accuracy=0.5, margin=1.25, valid_accuracy=0.75))
    line = log.lines[0]
    assert line["pairs"] == 100 and line["pairs_per_s"] == 200 and "tokens" not in line
    assert (line["accuracy"], line["margin"], line["valid_accuracy"]) == (0.5, 1.25, 0.75)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_library_that_is_not_installed_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RequestError, match=f"--report-to {name}.*pip install {name}"):
        reporter(name, tmp_path, {})

"""Metrics of a run: metrics.jsonl, one line per step, and optionally an experiment tracker."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import CheckpointError, RequestError, message_of
from phi4_mlx.files.atomic import replacing
from phi4_mlx.files.manifest import file_sha256
from phi4_mlx.files.regular_file import read_regular

if TYPE_CHECKING:
    from phi4_mlx.lora.progress import Step

METRICS_FILE, CURVE_FILE = "metrics.jsonl", "loss.png"
METRICS_BYTES = 2**30  # limit of that file; a step has about 300 bytes
OPTIONAL = ("accuracy", "margin", "valid_loss", "valid_accuracy")  # fields that not every step has

Metrics = dict[str, Any]
"""A line of metrics.jsonl."""

Proof = dict[str, Any]
"""Number of "bytes" at the beginning of metrics.jsonl, and their "sha256"."""


class MetricsLog:
    """The metrics file of a run.

    Args:
        folder: the adapter's folder.
        step: the last step to keep; later lines are of steps that an interrupted run will make again.
        report: called with the metrics of each step; see `reporter`.
        noun: the unit that the loss is averaged over, "targets" or "pairs".
        proof: of the lines that a checkpoint was written after; see `proof`. None for none.

    Attributes:
        path: the file.
        lines: the metrics of all steps.

    Raises:
        CheckpointError: the file exists and does not begin with the lines of the proof.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        report: Callable[[Metrics], Any] = lambda metrics: None,
        noun: str = "targets",
        proof: Proof | None = None,
    ):
        self._report = report
        self._count = "tokens" if noun == "targets" else noun
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        if proof is not None and self.path.exists() and _proof(self.path, proof["bytes"]) != proof:
            raise CheckpointError(
                f"{self.path} is damaged or has been changed since the checkpoint of step {step}; move it away, and "
                "--resume continues without the earlier metrics"
            )
        self.lines = [line for line in read_metrics(self.path) if line["step"] <= step]
        with replacing(self.path) as partial:
            partial.write_bytes(b"".join(map(_encoded, self.lines)))
        self._written, self._end = len(self.lines), self.path.stat().st_size  # lines and bytes on the disk

    def add(self, step: Step) -> None:
        """Appends a step, and earlier ones that could not be written.

        Raises:
            OSError: the file could not be written; the step is written with the next one.
        """
        line: Metrics = {
            "step": step.step,
            "loss": step.loss,
            "learning_rate": step.learning_rate,
            self._count: step.tokens,
            "grad_norm": step.grad_norm,
            f"{self._count}_per_s": step.tokens / step.seconds,
            "seconds": step.seconds,
            "peak_bytes": step.peak_bytes,
        }
        line |= {name: value for name in OPTIONAL if (value := getattr(step, name)) is not None}
        self.lines.append(line)
        try:
            self.flush()
        finally:
            self._report(line)

    def proof(self) -> Proof | None:
        """Number of bytes on the disk, and their SHA-256; None if the file is gone."""
        try:
            return _proof(self.path, self._end)
        except OSError:
            return None

    def flush(self) -> None:
        """Writes all lines that are not on the disk yet.

        Raises:
            OSError: the file could not be written.
        """
        if self._written == len(self.lines):
            return
        new = b"".join(map(_encoded, self.lines[self._written :]))
        with self.path.open("r+b") as file:
            file.seek(self._end)  # overwrites the part of a line that a failed write may have left
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        self._written, self._end = len(self.lines), self._end + len(new)

    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """The losses by step.

        Returns:
            "training" and "validation" -> (steps, losses in nats); without a curve that has no points.
        """
        found: dict[str, tuple[list[int], list[float]]] = {}
        for name, key in (("training", "loss"), ("validation", "valid_loss")):
            points = [(line["step"], line[key]) for line in self.lines if key in line]
            if points:
                found[name] = ([step for step, _ in points], [loss for _, loss in points])
        return found


def reporter(name: str | None, folder: Path, settings: Mapping[str, Any]) -> Callable[[Metrics], Any]:
    """Starts an experiment tracker.

    Args:
        name: "wandb" or "tensorboard"; None for none.
        folder: the adapter's folder, which also takes the tracker's files.
        settings: the run's settings, which wandb records.

    Returns:
        A function that sends the metrics of a step; it raises OSError if the tracker fails.

    Raises:
        RequestError: the library is not installed, or fails to start.
    """
    if name is None:
        return lambda metrics: None
    check_reporter(name)
    try:
        send = _wandb(folder, settings) if name == "wandb" else _tensorboard(folder)
    except Exception as error:  # a missing login, for example; each library raises its own errors
        raise RequestError(f"--report-to {name}: {' '.join(str(error).split())}") from error

    def report(metrics: Metrics) -> None:
        try:
            send(metrics)
        except Exception as error:  # must not end a run
            raise OSError(errno.EIO, message_of(error), name) from error

    return report


def _wandb(folder: Path, settings: Mapping[str, Any]) -> Callable[[Metrics], Any]:
    import wandb

    run = wandb.init(dir=str(folder), config=dict(settings))
    return lambda metrics: run.log(metrics, step=metrics["step"])


def _tensorboard(folder: Path) -> Callable[[Metrics], Any]:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))

    def report(metrics: Metrics) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items() if name != "step"]
        writer.add_event(Event(wall_time=time.time(), step=metrics["step"], summary=Summary(value=values)))
        writer.flush()

    return report


def check_reporter(name: str | None) -> None:
    """Raises RequestError if the library of an experiment tracker is not installed."""
    if name is not None and find_spec(name) is None:
        raise RequestError(f"--report-to {name} needs a library: pip install {name}, or leave it out")


def read_metrics(path: Path) -> list[Metrics]:
    """Reads the lines of a metrics file, up to the first that is incomplete."""
    lines: list[Metrics] = []
    if not path.exists():
        return lines
    for text in read_regular(path, METRICS_BYTES).decode("utf-8", "replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


def _proof(path: Path, length: int) -> Proof:
    return {"bytes": length, "sha256": file_sha256(path, length)}


def _encoded(line: Metrics) -> bytes:
    return json.dumps(line).encode() + b"\n"

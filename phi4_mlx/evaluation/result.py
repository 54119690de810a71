"""The result of a task: metrics with standard errors, the settings they hold for, and the score of every document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phi4_mlx.errors import RequestError

Json = Any
"""A JSON value: None, bool, int, float, str, list or dict."""


@dataclass(frozen=True)
class Metric:
    """A figure over documents.

    Attributes:
        name: such as "accuracy".
        value: usually from 0 to 1.
        stderr: standard error of `value`, in its unit; None if it is not defined.
        count: documents it is the mean of.
    """

    name: str
    value: float
    stderr: float | None
    count: int

    def to_json(self) -> dict[str, Json]:
        """The metric as JSON values; a value that is not finite is null there."""
        return {**vars(self), "value": self.value if math.isfinite(self.value) else None}

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> Metric:
        """The metric that `to_json` described.

        Raises:
            KeyError, TypeError, ValueError: it is not one.
        """
        name, number, stderr, count = (value[key] for key in ("name", "value", "stderr", "count"))
        _check(isinstance(name, str) and is_score(number) and is_score(stderr) and isinstance(count, int), name)
        return cls(name, math.nan if number is None else float(number), stderr, count)


@dataclass(frozen=True)
class TaskResult:
    """The findings of a task.

    Attributes:
        task: its name.
        metrics: the first is the main one.
        settings: what another run must share to be comparable, as JSON values.
        samples: one a document, each with "id" (unique in the task) and "score" (of the main metric); runs are paired
            by "id".
        note: one line for people, such as what differs from a published setting.
        groups: the same metrics by category, language, length or the like.
    """

    task: str
    metrics: list[Metric]
    settings: dict[str, Json]
    samples: list[dict[str, Json]]
    note: str = ""
    groups: dict[str, list[Metric]] = field(default_factory=dict)

    @property
    def main(self) -> Metric:
        """The metric that tables and pictures show."""
        return self.metrics[0]

    def to_json(self) -> dict[str, Json]:
        """The result as JSON values."""
        return {
            "task": self.task,
            "metrics": [metric.to_json() for metric in self.metrics],
            "settings": self.settings,
            "note": self.note,
            "groups": {name: [metric.to_json() for metric in metrics] for name, metrics in self.groups.items()},
            "samples": self.samples,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> TaskResult:
        """The result that `to_json` described.

        Raises:
            RequestError: a field is missing or has another type.
        """
        try:
            read = Metric.from_json
            groups = {name: [read(metric) for metric in metrics] for name, metrics in value["groups"].items()}
            metrics = [read(metric) for metric in value["metrics"]]
            task, samples, settings, note = (value[key] for key in ("task", "samples", "settings", "note"))
            _check(bool(metrics) and isinstance(settings, dict) and isinstance(note, str), task)
            for sample in samples:
                _check(isinstance(sample["id"], str) and is_score(sample["score"]), sample["id"])
            return cls(str(task), metrics, settings, list(samples), note, groups)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RequestError(f"it is not a result of evaluate: {error}") from None


def is_score(value: Json) -> bool:
    """True for a finite number, and for None, which stands for none."""
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def _check(good: bool, where: Json) -> None:
    if not good:
        raise ValueError(f"{where!r:.100} has a field of another type")


def mean(name: str, scores: Sequence[float]) -> Metric:
    """The mean of independent scores, with its standard error.

    Args:
        name: of the metric.
        scores: one a document; at least one.

    Returns:
        The metric; its standard error is that of a sample (n - 1), None for a single score.
    """
    count = len(scores)
    value = math.fsum(scores) / count
    spread = math.fsum((score - value) ** 2 for score in scores)
    return Metric(name, value, math.sqrt(spread / (count - 1) / count) if count > 1 else None, count)


def shown(value: Json) -> str:
    """A setting as people read it, at most 100 characters."""
    if value in (None, {}, []):
        return "none"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {shown(each)}" for name, each in value.items())[:100]
    return (", ".join(map(str, value)) if isinstance(value, list) else f"{value}")[:100]

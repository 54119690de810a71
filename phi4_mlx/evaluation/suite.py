"""Suites: tables of published figures, with the nearest public setting of each row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.suggestion import suggestion

_FOLDER = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Row:
    """A row of a published table.

    Attributes:
        name: as published.
        setting: as published, such as "5-shot".
        task: ours or lm-eval's.
        metric: the one to show; None for the task's main one.
        shots: solved examples before each question.
        chat: True if it is asked in the model's chat format.
        max_tokens: longest answer, where the model writes one.
        repeats: answers drawn for each question, where the model's authors advise sampling.
        judged: True if a judge scores it, so that it has no part in a mean.
        differs: what is known to differ from the published setting.
        published: column -> published figure in percent.
    """

    name: str
    setting: str
    task: str
    metric: str | None
    shots: int | None
    chat: bool | None
    max_tokens: int | None
    repeats: int
    judged: bool
    differs: str
    published: dict[str, float]


@dataclass(frozen=True)
class Section:
    """A published table.

    Attributes:
        name: its title.
        columns: the models of its columns.
        sources: where the figures are published.
        rows: in the published order.
        overall: column -> the published mean, if there is one.
    """

    name: str
    columns: tuple[str, ...]
    sources: tuple[str, ...]
    rows: tuple[Row, ...]
    overall: dict[str, float]


@dataclass(frozen=True)
class Suite:
    """A suite by name, with the folder of its own tasks in YAML."""

    name: str
    folder: Path
    sections: tuple[Section, ...]

    @property
    def rows(self) -> list[Row]:
        """The rows of all sections."""
        return [row for section in self.sections for row in section.rows]


def suites() -> list[str]:
    """The names of the suites."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/suite.yaml"))


def load_suite(name: str) -> Suite:
    """Reads a suite.

    Args:
        name: one of `suites`.

    Raises:
        RequestError: there is none of this name.
    """
    if name not in suites():
        known = ", ".join(suites())
        raise RequestError(f"{name!r:.100} is not a suite{suggestion(name, suites()) or f'; there is {known}'}")
    import yaml

    folder = _FOLDER / name
    value = yaml.safe_load((folder / "suite.yaml").read_text(encoding="utf-8"))
    return Suite(name, folder, tuple(_section(each, value["sources"]) for each in value["sections"]))


def _section(value: dict[str, Any], sources: dict[str, str]) -> Section:
    columns = tuple(value["columns"])
    return Section(
        value["name"],
        columns,
        tuple(sources[name] for name in value["sources"]),
        tuple(_row(each, columns) for each in value["rows"]),
        dict(zip(columns, value.get("overall", ()), strict=False)),
    )


def _row(value: dict[str, Any], columns: tuple[str, ...]) -> Row:
    return Row(
        name=value["name"],
        setting=value["setting"],
        task=value["task"],
        metric=value.get("metric"),
        shots=value.get("shots"),
        chat=value.get("chat"),
        max_tokens=value.get("max_tokens"),
        repeats=value.get("repeats", 1),
        judged=value.get("judged", False),
        differs=value["differs"],
        published=dict(zip(columns, value["published"], strict=True)),
    )

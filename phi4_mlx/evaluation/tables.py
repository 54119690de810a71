"""Results as Markdown: a run's tasks, or a suite's rows beside the published figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from phi4_mlx.evaluation.result import Metric, TaskResult, shown
from phi4_mlx.evaluation.run import Run
from phi4_mlx.evaluation.suite import Row, Section, Suite

NEAREST = "nearest public setting"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Args:
        head: the names of the columns; the first is flush left.
        rows: cells, which may have any text.
    """
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def run_markdown(runs: Sequence[Run], suite: Suite | None) -> str:
    """A run as Markdown.

    Args:
        runs: the run, then those of the comparators.
        suite: the suite that was run, if one was.
    """
    run = runs[0]
    tasks = "" if suite is None else "".join(_section(section, suite, runs) for section in suite.sections)
    made = ", ".join(f"{name} {number}" for name, number in run.versions.items())
    given = ", ".join(f"{name} {shown(value)}" for name, value in run.settings.items() if value not in (None, {}, []))
    parts = [
        f"# {run.model}",
        f"Fingerprint {run.fingerprint}; {made}.  \nSettings: {given or 'defaults'}.",
        tasks or _tasks(runs),
        _missing(run),
        _groups(run),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def percent(metric: Metric) -> str:
    """A share with its standard error, in percent."""
    error = "" if metric.stderr is None else f" ± {100 * metric.stderr:.1f}"
    return f"{100 * metric.value:.1f}{error}"


def plain(metric: Metric) -> str:
    """A figure with its standard error."""
    error = "" if metric.stderr is None else f" ± {metric.stderr:.2g}"
    return f"{metric.value:.4g}{error}"


def overall(rows: Sequence[Row], run: Run) -> tuple[Metric, list[Row]] | None:
    """The mean of the rows that were run, without judged ones; None if there is none.

    Returns:
        (the mean with its standard error, the rows it is made of)
    """
    taken = [row for row in rows if row.name in run.results and not row.judged]
    if not taken:
        return None
    found = [run.results[row.name].main for row in taken]
    errors = [metric.stderr for metric in found if metric.stderr is not None]
    stderr = math.sqrt(math.fsum(error**2 for error in errors)) / len(taken) if len(errors) == len(taken) else None
    value = math.fsum(metric.value for metric in found) / len(taken)
    return Metric("mean", value, stderr, sum(metric.count for metric in found)), taken


def judges(section: Section, runs: Sequence[Run]) -> list[str]:
    """The local judges of a section's judged rows."""
    results = [run.results[row.name] for run in runs for row in section.rows if row.judged and row.name in run.results]
    return list(dict.fromkeys(name for result in results for name in result.groups))


def _section(section: Section, suite: Suite, runs: Sequence[Run]) -> str:
    judged = judges(section, runs)
    head = ["row", "setting", *(run.model for run in runs), *judged, "documents", *section.columns]
    rows = [_row(row, section, runs, judged) for row in section.rows]
    means = [overall(section.rows, run) for run in runs]
    if means[0] is not None:
        mean, taken = means[0]
        published = [_mean([row.published[column] for row in taken]) for column in section.columns]
        ours = ["" if each is None else percent(each[0]) for each in means]
        rows.append([f"mean of {len(taken)} rows", "", *ours, *[""] * len(judged), f"{mean.count:,}", *published])
    if section.overall:
        shown = [f"{section.overall[column]:.1f}" for column in section.columns]
        rows.append(["overall, as published", "", *[""] * (len(runs) + len(judged) + 1), *shown])
    about = (
        f"Ours is in percent with one standard error; each of our rows is the {NEAREST}, not a reproduction. "
        f"Published figures: {', '.join(section.sources)}."
    )
    if section.overall:
        about += " The published overall is not the mean of the published rows."
    different = "\n".join(f"- {row.name}: {row.differs}." for row in section.rows)
    return f"## {section.name}\n\n{about}\n\n{markdown_table(head, rows)}\n\nWhat differs:\n\n{different}\n\n"


def _row(row: Row, section: Section, runs: Sequence[Run], judged: Sequence[str]) -> list[str]:
    found = [run.results.get(row.name) for run in runs]
    ours = ["–" if each is None else "exported" if row.judged else percent(each.main) for each in found]
    scores = [
        next((percent(each.groups[name][0]) for each in found if each and name in each.groups), "") for name in judged
    ]
    scores = scores if row.judged else [""] * len(judged)
    count = "" if found[0] is None else f"{found[0].main.count:,}"
    return [row.name, row.setting, *ours, *scores, count, *(f"{row.published[name]}" for name in section.columns)]


def _tasks(runs: Sequence[Run]) -> str:
    """The table of the tasks of a run without a suite."""
    head = ["task", "metric", *(run.model for run in runs), "documents", "shots", "chat format"]
    rows = []
    for name, result in runs[0].results.items():
        for number, metric in enumerate(result.metrics):
            others = [_same(run.results.get(name), metric.name) for run in runs[1:]]
            about = ["", "", ""] if number else [f"{metric.count:,}", _shots(result), _yes(result)]
            rows.append(["" if number else name, metric.name, plain(metric), *others, *about])
    notes = "\n".join(f"- {name}: {result.note}" for name, result in runs[0].results.items() if result.note)
    return markdown_table(head, rows) + (f"\n\n{notes}" if notes else "")


def _same(result: TaskResult | None, metric: str) -> str:
    return next((plain(each) for each in (result.metrics if result else []) if each.name == metric), "–")


def _shots(result: TaskResult) -> str:
    shots = result.settings.get("shots")
    return " to ".join(map(str, dict.fromkeys((min(shots), max(shots))))) if isinstance(shots, list) and shots else ""


def _yes(result: TaskResult) -> str:
    chat = result.settings.get("chat_template")
    return "" if chat is None else "yes" if chat else "no"


def _missing(run: Run) -> str:
    if not run.missing:
        return ""
    return "Not run:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in run.missing.items())


def _groups(run: Run) -> str:
    """The parts of each result: categories, languages, lengths or subtasks."""
    rows = [
        [name, part, metrics[0].name, plain(metrics[0]), f"{metrics[0].count:,}"]
        for name, result in run.results.items()
        for part, metrics in result.groups.items()
        if metrics
    ]
    return "## Parts\n\n" + markdown_table(["task", "part", "metric", "value", "documents"], rows) if rows else ""


def _mean(values: Sequence[float]) -> str:
    return f"{math.fsum(values) / len(values):.1f}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

"""Pictures of results: bars with standard errors, ours beside the published figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from phi4_mlx.evaluation.result import Metric
from phi4_mlx.evaluation.run import Run
from phi4_mlx.evaluation.suite import Suite

NO_PICTURE = "pictures need matplotlib; pip install 'matplotlib>=3.8'"
Bars = list[tuple[str, list[Metric | None]]]
"""(name of a model, a figure in percent for each row, None where there is none)"""


def draw_run(runs: Sequence[Run], suite: Suite | None, folder: Path) -> list[Path] | None:
    """Draws the main metrics of a run.

    Args:
        runs: the run, then those of the comparators.
        suite: the suite that was run, if one was: its published figures are drawn beside.
        folder: the folder for the pictures.

    Returns:
        The pictures, one for each section of the suite; None if matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return None
    drawn = []
    if suite is None:
        shares = [name for name, result in runs[0].results.items() if 0 <= result.main.value <= 1]
        if shares:
            bars = [(run.model, [_ours(run, name) for name in shares]) for run in runs]
            drawn.append(_draw(bars, shares, "", folder / "results.png"))
    for section in () if suite is None else suite.sections:
        rows = [row for row in section.rows if row.name in runs[0].results and not row.judged]
        if not rows:
            continue
        bars = [(f"{run.model} (here)", [_ours(run, row.name) for row in rows]) for run in runs]
        bars += [
            (f"{column} (published)", [Metric("", row.published[column], None, 0) for row in rows])
            for column in section.columns
        ]
        title = f"{section.name}: nearest public settings beside published figures"
        file = "results.png" if not drawn else f"results-{section.name.lower()}.png"
        drawn.append(_draw(bars, [f"{row.name}\n{row.setting}" for row in rows], title, folder / file))
    return drawn


def _ours(run: Run, name: str) -> Metric | None:
    result = run.results.get(name)
    if result is None or not math.isfinite(result.main.value):
        return None
    main = result.main
    return Metric(main.name, 100 * main.value, None if main.stderr is None else 100 * main.stderr, main.count)


def _label(row: str) -> str:
    """A row's name in lines as wide as its bars; names of tasks break after underscores."""
    lines = (line for part in row.splitlines() for line in textwrap.wrap(part.replace("_", "_ "), 18))
    return "\n".join(lines).replace("_ ", "_")


def _draw(bars: Bars, rows: Sequence[str], title: str, path: Path) -> Path:
    """Draws bars in groups, one a row; ours are filled, published ones pale."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(9, len(rows))
    lines = math.ceil(len(rows) / columns)
    inches = max(8.0, 1.5 * columns)
    figure = Figure(figsize=(inches, 1.2 + 2.9 * lines), layout="constrained")
    colours = colormaps["tab10"]
    width = 0.85 / len(bars)
    for line, axes in enumerate(figure.subplots(lines, 1, squeeze=False)[:, 0]):
        part = rows[line * columns : (line + 1) * columns]
        for place, (name, figures) in enumerate(bars):
            shown = figures[line * columns : (line + 1) * columns]
            kept = [(at + place * width, each) for at, each in enumerate(shown) if each is not None]
            axes.bar(
                [at for at, _ in kept],
                [each.value for _, each in kept],
                width,
                yerr=[each.stderr or 0 for _, each in kept] if any(each.stderr for _, each in kept) else None,
                label=name if line == 0 else None,
                color=colours(place % 10),
                alpha=0.45 if name.endswith("(published)") else 1,
                error_kw={"elinewidth": 1, "capsize": 2},
            )
        middle, half = 0.425 - width / 2, max(3, columns) / 2
        axes.set_xticks([at + middle for at in range(len(part))], [*map(_label, part)], fontsize=8)
        centre = middle + (columns - 1) / 2
        axes.set(ylim=(0, 100), xlim=(centre - half, centre + half), ylabel="%")
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=min(len(bars), int(inches / 3.2)), fontsize=8)
    figure.savefig(path, dpi=120)
    return path

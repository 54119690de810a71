"""Heat maps of the score by prompt length: against depth, a panel for each kind, and against language.

The RoPE boundary is a line between two columns. The colours (cividis) read the same with any colour vision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi4_mlx.evaluation.long_context.language import load_language
from phi4_mlx.evaluation.long_context.problem import KINDS

Sample = Mapping[str, Any]
_ACROSS = 2  # panels side by side
_LINE = "#d55e00"  # vermilion, with a white margin: visible on every colour of the map


def draw_heat_maps(samples: Sequence[Sample], boundary: int | None, folder: Path) -> str:
    """Draws length by depth for each language; if there are several, also for all together, and length by language.

    Args:
        samples: of the task, at least one.
        boundary: longest sequence under the short RoPE table; None if the model has one table.
        folder: for `long-context-<language>.png`; made if it does not exist.

    Returns:
        A note if nothing could be drawn, else "".
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "no heat maps: matplotlib is missing; pip install 'matplotlib>=3.8'"
    folder.mkdir(parents=True, exist_ok=True)
    codes = sorted({sample["language"] for sample in samples})
    kinds = [kind for kind in KINDS if any(sample["kind"] == kind for sample in samples)]
    pictures = {code: (load_language(code).name, [s for s in samples if s["language"] == code]) for code in codes}
    if len(codes) > 1:
        pictures["all"] = f"{len(codes)} languages", list(samples)
        _draw(folder / "long-context-languages.png", "by language", {"all kinds": samples}, "language", boundary)
    for code, (name, own) in pictures.items():
        panels = {kind: [sample for sample in own if sample["kind"] == kind] for kind in kinds}
        _draw(folder / f"long-context-{code}.png", name, panels, "depth", boundary)
    return ""


def _draw(path: Path, title: str, panels: Mapping[str, Sequence[Sample]], row_key: str, boundary: int | None) -> None:
    """One picture; all its panels have the same rows and columns."""
    from matplotlib.figure import Figure

    everything = [sample for samples in panels.values() for sample in samples]
    columns = sorted({sample["length"] for sample in everything})
    rows = sorted({sample[row_key] for sample in everything})
    across = min(_ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    width, height = across * max(3.6, 1.2 + 0.62 * len(columns)), 0.9 + down * (1.3 + 0.3 * len(rows))
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"Long context, {title}: mean score by prompt length and {row_key}", fontsize=11)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for panel, (name, samples) in zip(axes, panels.items(), strict=False):
        _cells(panel, samples, columns, rows, row_key)
        panel.set_title(name, fontsize=10)
        if boundary is not None and columns[0] <= boundary < columns[-1]:
            at = sum(length <= boundary for length in columns) - 0.5
            panel.axvline(at, color="white", linewidth=5)
            panel.axvline(at, color=_LINE, linewidth=2.5)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    if boundary is not None:
        tables = f"up to {boundary:,} tokens, on the line's left: short RoPE table; on its right: long RoPE table"
        figure.supxlabel(tables, fontsize=8, color=_LINE)
    figure.savefig(path, dpi=120)


def _cells(panel: Any, samples: Sequence[Sample], columns: Sequence[int], rows: Sequence[Any], row_key: str) -> None:
    """A cell for each length and row with its mean score; what was not asked stays white."""
    cells: dict[tuple[int, int], list[float]] = {}
    for sample in samples:
        cells.setdefault((rows.index(sample[row_key]), columns.index(sample["length"])), []).append(sample["score"])
    grid = [[math.nan] * len(columns) for _ in rows]
    for (row, column), scores in cells.items():
        score = grid[row][column] = sum(scores) / len(scores)
        colour = "black" if score > 0.5 else "white"
        panel.text(column, row, f"{score:.2f}", ha="center", va="center", color=colour, fontsize=8)
    panel.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    panel.set_xticks(range(len(columns)), [f"{length:,}" for length in columns], rotation=45, ha="right", fontsize=8)
    panel.set_yticks(range(len(rows)), [str(row) for row in rows], fontsize=8)
    panel.set_xlabel("prompt, tokens", fontsize=8)
    panel.set_ylabel("depth, %" if row_key == "depth" else row_key, fontsize=8)

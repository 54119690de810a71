"""Heat maps of the score by length and depth, a panel for each kind; the RoPE boundary is a line between columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Sample = Mapping[str, Any]
_ACROSS = 2  # panels side by side


def draw_heat_maps(samples: Sequence[Sample], boundary: int | None, folder: Path) -> str:
    """Draws a picture for each language and, if there are several, one for all together.

    Args:
        samples: of the task, at least one.
        boundary: longest sequence under the short RoPE table; None if the model has one table.
        folder: for `long-context-<language>.png`; made if it does not exist.

    Returns:
        A note if nothing could be drawn, else "".
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no heat maps: pip install 'phi4-mlx[plots]'"
    folder.mkdir(parents=True, exist_ok=True)
    codes = list(dict.fromkeys(sample["language"] for sample in samples))
    groups = {code: [sample for sample in samples if sample["language"] == code] for code in codes}
    if len(codes) > 1:
        groups = {"all": list(samples), **groups}
    for code, members in groups.items():
        title = f"{len(codes)} languages" if code == "all" else f"language: {code}"
        kinds = list(dict.fromkeys(sample["kind"] for sample in members))
        lengths = sorted({sample["length"] for sample in members})
        depths = sorted({sample["depth"] for sample in members})
        down = math.ceil(len(kinds) / _ACROSS)
        width = 1.6 + 0.72 * len(lengths)
        figure = Figure(figsize=(_ACROSS * width + 0.8, 1.1 + down * (1.2 + 0.34 * len(depths))), layout="constrained")
        figure.suptitle(f"Long context, {title}: mean score by prompt length and depth")
        panels = figure.subplots(down, _ACROSS, squeeze=False).ravel()
        for panel, kind in zip(panels, kinds, strict=False):
            _panel(panel, [sample for sample in members if sample["kind"] == kind], lengths, depths, boundary)
            panel.set_title(kind, fontsize=10)
        for panel in panels[len(kinds) :]:
            panel.set_axis_off()
        figure.savefig(folder / f"long-context-{code}.png", dpi=120)
    return ""


def _panel(
    panel: Any, samples: Sequence[Sample], lengths: Sequence[int], depths: Sequence[int], boundary: int | None
) -> None:
    """One kind: a cell for each length and depth with its mean score; cells that were not asked stay white."""
    cells: dict[tuple[int, int], list[float]] = {}
    for sample in samples:
        cells.setdefault((depths.index(sample["depth"]), lengths.index(sample["length"])), []).append(sample["score"])
    grid = [[math.nan] * len(lengths) for _ in depths]
    for (row, column), scores in cells.items():
        score = grid[row][column] = sum(scores) / len(scores)
        colour = "black" if score > 0.55 else "white"  # on cividis, which is readable with any colour vision
        panel.text(column, row, f"{score:.2f}", ha="center", va="center", color=colour, fontsize=8)
    panel.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right", fontsize=8)
    panel.set_yticks(range(len(depths)), [f"{depth}" for depth in depths], fontsize=8)
    panel.set_xlabel("prompt, tokens", fontsize=8)
    panel.set_ylabel("depth, %", fontsize=8)
    if boundary is not None and lengths[0] <= boundary < lengths[-1]:
        at = sum(length <= boundary for length in lengths) - 0.5
        panel.axvline(at, color="#d55e00", linewidth=2.5)
        panel.text(at, -0.62, f"short | long RoPE table ({boundary:,})", ha="center", fontsize=7, color="#d55e00")

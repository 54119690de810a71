"""Heat maps: one a language, the boundary as a line, and a note where matplotlib is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from phi4_mlx.evaluation.long_context.heat_map import draw_heat_maps


def samples(*codes: str) -> list[dict[str, Any]]:
    return [
        {"language": code, "kind": kind, "length": length, "depth": depth, "score": depth / 100}
        for code in codes
        for kind in ("needle", "count")
        for length in (200, 300, 400)
        for depth in (0, 100)
    ]


@pytest.mark.slow
def test_a_picture_for_each_language_and_for_all(tmp_path: Path) -> None:
    assert draw_heat_maps(samples("en", "de"), 256, tmp_path / "new") == ""
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {f"long-context-{name}.png" for name in ("en", "de", "all", "languages")}
    draw_heat_maps(samples("th"), None, tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["long-context-th.png"]


@pytest.mark.slow
@pytest.mark.parametrize(("boundary", "place"), [(256, 0.5), (300, 1.5), (100, None), (400, None), (None, None)])
def test_the_boundary_is_a_line_between_its_columns(
    boundary: int | None, place: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[float] = []
    values: list[str] = []
    draw, write = Axes.axvline, Axes.text
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **style: (lines.append(x), draw(self, x, **style))[1])
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, text, **style: (values.append(text), write(self, x, y, text, **style))[1]
    )
    draw_heat_maps(samples("en"), boundary, tmp_path)
    assert set(lines) == ({place} if place else set())
    assert values.count("1.00") == values.count("0.00") == 6


def test_without_matplotlib_there_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'matplotlib>=3.8'" in draw_heat_maps(samples("en"), 256, tmp_path)
    assert not [*tmp_path.iterdir()]

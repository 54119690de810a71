"""The compare command: the figures as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi4_mlx.commands import compare
from phi4_mlx.commands.compare import table
from phi4_mlx.evaluation.compare import Comparison, Figure, Side
from tests.conftest import TinyCheckpoint


def test_json_and_table_have_the_same_figures(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "1 2 3 4"}\n{"text": "7 6 5"}\n')
    arguments = [str(tiny_checkpoint("a")), str(tiny_checkpoint("b", seed=2)), "--data", str(data)]
    assert compare.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 2 and found["a"]["name"] == arguments[0]
    assert compare.main(arguments) == 0
    shown = capsys.readouterr().out
    for side in ("a", "b"):
        for figure in ("kl", "perplexity"):
            value, low, high = (f"{found[side][figure][key]:.4g}" for key in ("value", "low", "high"))
            assert f"{value} [{low}, {high}]" in shown
    assert f"{found['agreement']['value']:.2%}" in shown


@pytest.mark.parametrize(("outside", "noted"), [(0.0002, False), (0.02, True)])
def test_estimated_tokens_are_noted_where_they_count(outside: float, noted: bool) -> None:
    figure = Figure(0.1, None, None)
    sides = [Side(name, 10**9, figure, figure, outside, 0.03, (10.0,)) for name in ("one", "two")]
    shown = table(Comparison(sides[0], sides[1], figure, 1, 100, ()))
    assert ("0.02 and 0.02 is estimated" in shown) == noted
    assert "[" not in shown  # one sample has no interval


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "demo"], "--data"),
        (["demo"], "B"),
        (["demo", "nowhere", "--data", "x.jsonl"], "nowhere"),
        (["demo", "demo", "--data", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1

"""The context command: the numbers of a memory plan as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from phi4_mlx.checkpoint import load_model
from phi4_mlx.commands import context
from phi4_mlx.generation.memory import plan_context


def test_json_has_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert context.main(["--model", "demo", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [each["kv_bits"] for each in report["longest"]] == [None, 8, 4]
    for row in report["contexts"]:
        assert 0 < row["cache_bytes"] < row["peak_bytes"] and row["peak_bytes"] > report["weights_bytes"]
    by_bits = {row["kv_bits"]: row["cache_bytes"] for row in report["contexts"] if row["tokens"] == 4096}
    assert by_bits[None] > 1.5 * by_bits[8] > 2.5 * by_bits[4]


def test_the_table_marks_what_does_not_fit(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint(max_position_embeddings=4096)
    plan = plan_context(load_model(folder))
    monkeypatch.setattr("phi4_mlx.generation.memory.memory_limit", lambda: plan.peak_bytes(1024))
    assert context.main(["--model", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    marked = {line.split()[0]: line.endswith("!") for line in lines if line[:10].strip().replace(",", "").isdigit()}
    assert marked == {"512": False, "1,024": False, "2,048": True, "4,096": True}
    most = next(line for line in lines if line.startswith("at most"))
    assert 1024 <= int(most.split()[-1].replace(",", "")) < 2048
    assert "--kv-bits" not in "".join(lines)  # heads of 16 numbers cannot be quantised

"""The runner of `make bench` and its report, on made-up scripts and results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def module(name: str, file: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports a file from tests/bench, which is not a package."""
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location(name, BENCH / file)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("report", "report.py", monkeypatch)


@pytest.fixture
def runner(report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("bench_main", "__main__.py", monkeypatch)


RESULTS: dict[str, dict[str, Any]] = {
    "steps": {"ratios": {"nodes": 0.91, "operations": 0.8, "host": 0.5}},
    "speed": {"settings": {"demo decode": {"ratio": 1.25, "bar": 1.0}, "demo prefill": {"ratio": 0.9, "bar": 1.0}}},
    "long_context": {
        "ratio": 0.05,
        "contexts": [
            {"context": 4096, "cache": 5e6, "whole": 9e6, "mlx_lm_whole": 9e7, "computed": False},
            {"context": 8192, "cache": 1e7, "whole": 2e7, "mlx_lm_whole": 2e8, "computed": True},
        ],
    },
    "speculation": {"tokens_per_pass": {"edit": 3.5, "free": 1.1}},
    "retrieval": {"rows": []},
}


def test_a_bar_is_an_upper_or_a_lower_limit(report: ModuleType) -> None:
    kept = {row.figure.name: row.ok for row in report.rows(RESULTS)}
    assert kept == {
        "graph nodes of a decode step, 32 layers": False,
        "operations of a decode step, each `mx.fast` call one": True,
        "host time to build a decode step": True,
        "tokens per second, demo decode": True,
        "tokens per second, demo prefill": False,
        "peak of attention over a 4-bit cache, 32,768 tokens": True,
    }


def test_the_table_lists_every_script(report: ModuleType) -> None:
    text = report.markdown(RESULTS, {"teach": "killed | by hand"}, {"machine": "here"}, [Path("out/ratios.png")])
    assert "| steps | graph nodes of a decode step, 32 layers | 0.91 of mlx-lm | ≤ 0.9 | **no** |" in text
    assert "| speed | tokens per second, demo decode | 1.25 of mlx-lm | ≥ 1 | yes |" in text
    assert "| retrieval | see retrieval.log | | | |" in text
    assert "| teach | **failed**: killed / by hand | | | **no** |" in text
    assert "![ratios](ratios.png)" in text and "- machine: here" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {6}


def test_only_plots_with_results_are_drawn(report: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = report.draw(RESULTS, tmp_path)
    assert [path.name for path in drawn] == ["ratios.png", "memory.png", "accepted.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert report.draw({"retrieval": {}}, tmp_path) == []


def test_every_figure_names_a_script(report: ModuleType, runner: ModuleType) -> None:
    names = runner.scripts(BENCH)
    assert {figure.bench for figure in report.FIGURES} <= set(names)
    assert names[-1] == "calibration" and not {"demo_world", "harness", "peer", "report", "__main__"} & set(names)


@pytest.mark.parametrize(
    ("code", "result", "why"),
    [
        ("print('a line'); print('{\"ok\": true}')", {"ok": True}, ""),
        ("print('[1]')", None, "the last line is not a JSON object"),
        ("", None, "the last line is not a JSON object"),
        ("raise SystemExit('no such model')", None, "no such model"),
        ("raise SystemExit(3)", None, "exit code 3"),
    ],
)
def test_a_script_gives_a_result_or_a_reason(
    code: str, result: dict[str, Any] | None, why: str, runner: ModuleType, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(code)
    assert runner.run(script, tmp_path / "log") == (result, why)


def test_a_script_that_fails_does_not_stop_the_others(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = "if __name__ == \"__main__\":\n    "
    (tmp_path / "a.py").write_text(main + "raise SystemExit('broken')")
    (tmp_path / "steps.py").write_text(main + f"print('''{json.dumps(RESULTS['steps'])}''')")
    monkeypatch.setattr(runner, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "--output", str(tmp_path / "out")])
    assert runner.main() == 1
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("[1/2] a ...") and first.endswith("FAILED: broken")
    assert second.startswith("[2/2] steps ...") and "graph nodes of a decode step, 32 layers: 0.91" in second
    summary = json.loads(last)
    assert summary["failed"] == ["a"] and summary["ok"] is False
    assert summary["missed"] == {"steps: graph nodes of a decode step, 32 layers": 0.91}
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved == {"steps": RESULTS["steps"], "failed": {"a": "broken"}}
    assert "**failed**: broken" in (tmp_path / "out" / "RESULTS.md").read_text()

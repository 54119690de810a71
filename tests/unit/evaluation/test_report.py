"""Two runs side by side: what is compared, what is left out and said, and damaged results."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.errors import Phi4Error, RequestError
from phi4_mlx.evaluation.report import compared
from phi4_mlx.evaluation.result import Metric, TaskResult, mean
from phi4_mlx.evaluation.run import Run, read_run


def run(scores: dict[str, float | None], metric: str = "acc", **about: Any) -> Run:
    samples = [{"id": name, "score": score, "document": name.upper()} for name, score in scores.items()]
    found = [score for score in scores.values() if score is not None]
    result = TaskResult("task", [mean(metric, found)], {"shots": [0]}, samples)
    return Run("model", about.pop("fingerprint", "a" * 32), {}, {"mlx": "1"}, {"task": result}, **about)


def test_only_documents_of_both_with_the_same_content_and_a_score_are_compared() -> None:
    one = run({"a": 1, "b": 0, "c": 1, "d": 1, "e": None})
    other = run({"a": 0, "b": 0, "c": 1, "e": 1, "f": 1}, fingerprint="b" * 32)
    other.results["task"].samples[2]["document"] = "other"
    text = compared(one, other)
    row = next(line for line in text.splitlines() if line.startswith("| task | acc"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "task", "acc", "0.5000", "0.0000", "-0.5000 ± 0.5000", "1", "0", "2", "1", "McNemar, exact",
    ]  # fmt: skip
    assert "2 documents of one run only left out" in text
    assert "1 document of other content under the same id left out, such as c" in text
    assert "1 document without a score left out" in text and "the same model" not in text


def test_other_metrics_and_nothing_in_common_are_refused() -> None:
    with pytest.raises(RequestError, match="its metric is acc in A and f1 in B"):
        compared(run({"a": 1}), run({"a": 1}, metric="f1"))
    with pytest.raises(RequestError, match="no scored documents in common"):
        compared(run({"a": 1}), run({"b": 1}))


def test_a_figure_that_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    made = run({"a": 1.0})
    made.results["task"].metrics.append(Metric("perplexity", math.inf, None, 1))
    made.write(tmp_path)
    value = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert value["results"]["task"]["metrics"][1]["value"] is None
    assert math.isnan(read_run(tmp_path).results["task"].metrics[1].value)


def test_damaged_results_are_refused_in_one_line(tmp_path: Path) -> None:
    good = run({"a": 1.0, "b": 0.0})
    good.write(tmp_path)
    value = json.loads((tmp_path / "results.json").read_text())
    draw = random.Random(5)

    def places(node: Any) -> list[tuple[Any, Any]]:
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        return [(node, key) for key in keys] + [each for key in keys for each in places(node[key])]

    for _ in range(300):
        damaged = json.loads(json.dumps(value))
        node, key = draw.choice(places(damaged))
        node[key] = draw.choice([None, 3, "x", [], {}, [1], {"a": 1}, True, -1.5, "\ud800"])
        (tmp_path / "results.json").write_text(json.dumps(damaged))
        try:
            compared(read_run(tmp_path), good)
        except Phi4Error as error:
            assert "\n" not in str(error)

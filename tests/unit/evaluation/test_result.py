"""Results: standard errors by hand, and a round trip through JSON."""

from __future__ import annotations

import json

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.result import Metric, TaskResult, mean, shown


def test_mean_has_the_standard_error_of_a_sample() -> None:
    found = mean("accuracy", [1, 0, 1, 1])
    assert found == Metric("accuracy", 0.75, pytest.approx(0.25), 4)  # sqrt(0.75 / 3 / 4)
    assert mean("accuracy", [1]).stderr is None


def test_a_result_survives_json() -> None:
    result = TaskResult(
        "arc",
        [mean("accuracy", [1, 0])],
        {"shots": 5},
        [{"id": "0", "score": 1}],
        "by letter",
        {"easy": [mean("accuracy", [1])]},
    )
    assert TaskResult.from_json(json.loads(json.dumps(result.to_json()))) == result


@pytest.mark.parametrize("damage", [{"metrics": 3}, {"samples": [{"score": 1}]}, {"groups": []}])
def test_a_damaged_result_is_refused(damage: dict[str, object]) -> None:
    good = TaskResult("arc", [mean("accuracy", [1, 0])], {}, [{"id": "0", "score": 1}]).to_json()
    with pytest.raises(RequestError, match="not a result of evaluate"):
        TaskResult.from_json({**good, **damage})


@pytest.mark.parametrize(
    ("value", "text"),
    [([], "none"), (["arc", "gsm8k"], "arc, gsm8k"), ({"arc": [0, 3]}, "arc: 0, 3"), ("x" * 200, 100 * "x")],
)
def test_settings_are_shown_without_the_marks_of_a_list(value: object, text: str) -> None:
    assert shown(value) == text

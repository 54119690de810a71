"""The task from options to result, on the demo: its lessons of memory show that the right text reaches the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.long_context import task
from phi4_mlx.evaluation.options import Options
from phi4_mlx.evaluation.result import TaskResult
from phi4_mlx.evaluation.subject import Subject, load_subject

pytestmark = pytest.mark.slow
OPTIONS = Options(languages=("demo",), lengths=(160, 300), depths=(50,))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return load_subject("demo")


@pytest.fixture(scope="module")
def result(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> TaskResult:
    folder = tmp_path_factory.mktemp("long")
    with Answers(folder / "answers.jsonl") as answers:
        found = task.run(subject, answers, OPTIONS)
        assert len(answers) == 4
        told: list[tuple[int, int]] = []
        again = Options(**{**vars(OPTIONS), "folder": folder, "progress": lambda *both: told.append(both)})
        assert task.run(subject, answers, again).samples == found.samples
        assert len(answers) == 4 and told[-1] == (4, 4)
    assert (folder / "long-context-demo.png").stat().st_size > 10_000
    return found


def test_the_demo_finds_what_it_was_told(result: TaskResult) -> None:
    """No answer is right by chance: a code has 9,000 values."""
    score, recall, exact = result.metrics
    assert (score.name, recall.name, exact.name) == ("score", "recall", "exact")
    assert score.value >= 0.75 and score.count == 4 and score.stderr is not None
    assert all(sample["prompt_tokens"] == sample["length"] for sample in result.samples)


def test_results_are_grouped_by_table(result: TaskResult) -> None:
    assert result.settings["rope_boundary"] == 256 and result.settings["lengths"] == [160, 300]
    assert {sample["length"]: sample["table"] for sample in result.samples} == {160: "short table", 300: "long table"}
    assert [*result.groups][:5] == ["short table", "long table", "160 tokens", "300 tokens", "depth 50 %"]
    assert {"needle", "needle-distracted, long table", "language demo", "values: number"} <= result.groups.keys()
    assert all(metrics[0].count in (1, 2, 4) for metrics in result.groups.values())
    assert TaskResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_limit_and_samples_choose_questions(subject: Subject, result: TaskResult, tmp_path: Path) -> None:
    with Answers(tmp_path / "answers.jsonl") as answers:
        one = task.run(subject, answers, Options(**{**vars(OPTIONS), "limit": 1}))
        same = task.run(subject, answers, Options(**{**vars(OPTIONS), "samples": {"long-context": [0, 0]}}))
        assert len(answers) == 1 and one.samples == same.samples
        assert one.samples[0] in result.samples and one.metrics[0].stderr is None
        with pytest.raises(RequestError, match="long-context has no document 4; they are numbered 0 to 3"):
            task.run(subject, answers, Options(**{**vars(OPTIONS), "samples": {"long-context": [4]}}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(languages=("xx",)), "--languages 'xx' is not a language"),
        (Options(languages=("demo",), lengths=(5000,)), "--lengths 5,000: the context holds 4,096"),
        (Options(languages=("demo",), lengths=(20,)), "--lengths 20: the shortest question does not fit"),
        (Options(languages=("demo",), depths=(101,)), "--depths must be a whole number from 0 to 100, not 101"),
        (Options(languages=("demo",), max_tokens=4096), "lower --max-tokens"),
    ],
)
def test_what_cannot_be_asked_is_one_line(subject: Subject, options: Options, message: str, tmp_path: Path) -> None:
    with Answers(tmp_path / "answers.jsonl") as answers, pytest.raises(RequestError, match=message):
        task.run(subject, answers, options)
    assert not len(answers)


def test_questions_without_room_are_told(subject: Subject, tmp_path: Path) -> None:
    wide = Options(languages=("en",), lengths=(220,), depths=(0,), max_tokens=1)
    with Answers(tmp_path / "answers.jsonl") as answers:
        found = task.run(subject, answers, wide)
    assert "no room for count-common in 220 tokens (1 question)" in found.note
    assert {sample["kind"] for sample in found.samples} >= {"needle"} and found.main.value < 1

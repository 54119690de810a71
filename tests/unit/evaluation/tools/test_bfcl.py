"""The task `bfcl`: categories, aggregates, and answers that are kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.asking import Question
from phi4_mlx.evaluation.options import Options
from phi4_mlx.evaluation.result import Metric
from phi4_mlx.evaluation.subject import Subject, load_subject
from phi4_mlx.evaluation.tools import bfcl
from phi4_mlx.evaluation.tools.leaderboard import LIVE, NON_LIVE, Leaderboard
from phi4_mlx.generation.answer_batch import Answer
from phi4_mlx.tokens.chat_format import Phi35Mini
from phi4_mlx.tools.calls import ToolCall
from tests.leaderboard_answers import right_calls


@pytest.fixture(scope="module")
def demo() -> Subject:
    return load_subject("demo")


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[Answers]:
    with Answers(tmp_path / "bfcl.jsonl") as opened:
        yield opened


def answer(calls: Sequence[ToolCall]) -> Answer:
    return Answer("", "", "", tuple(calls), "stop", 1, 1)


@pytest.fixture(scope="module")
def right() -> dict[str, list[ToolCall]]:
    board = Leaderboard()
    return {case.name: right_calls(case) for category in (*NON_LIVE, "live_parallel") for case in board.cases(category)}


@pytest.fixture
def asked(right: dict[str, list[ToolCall]], monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """The questions of a run, in which every third answer is text and the others are right."""
    questions: list[Question] = []

    def ask(subject: Subject, given: Sequence[Question], *rest: Any) -> list[Answer]:
        questions.extend(given)
        return [answer(right[question.name] if n % 3 else []) for n, question in enumerate(given)]

    monkeypatch.setattr(bfcl, "ask", ask)
    return questions


def test_each_category_has_its_own_score(demo: Subject, answers: Answers, asked: list[Question]) -> None:
    result = bfcl.run(demo, answers, Options(categories=("non_live", "live_parallel"), limit=4))
    assert [question.name for question in asked][:5] == [*(f"simple_python_{n}" for n in range(4)), "simple_java_0"]
    assert {question.temp for question in asked} == {0.0} and asked[0].tools
    assert list(result.groups) == [*NON_LIVE, "live_parallel"]
    wrong = {sample["id"]: sample["mistake"] for sample in result.samples if not sample["score"]}
    assert wrong["simple_python_0"] == "the answer calls no tool"
    scores = [sample["score"] for sample in result.samples if sample["category"] == "multiple"]
    assert result.groups["multiple"] == [Metric("accuracy", sum(scores) / 4, pytest.approx(math.sqrt(
        sum((score - sum(scores) / 4) ** 2 for score in scores) / 3 / 4
    )), 4)]  # fmt: skip
    assert [metric.name for metric in result.metrics] == ["accuracy", "non_live"]
    assert result.main.count == 32 and result.settings["documents"] == 32
    assert result.settings["bfcl_eval"] == "2026.3.23"


def test_aggregates_are_the_leaderboards() -> None:
    categories = enumerate((*NON_LIVE, *LIVE), 1)
    values = {category: Metric("accuracy", n / 16, 0.01 * n, 10 * n) for n, category in categories}
    found = {metric.name: metric for metric in bfcl.aggregates({name: [each] for name, each in values.items()})}
    simple = (1 + 2 + 3) / 3
    assert found["non_live"].value == pytest.approx((simple + 4 + 5 + 6) / 4 / 16)
    assert found["live"].value == pytest.approx((8 * 8 + 9 * 9 + 10 * 10 + 11 * 11) / (8 + 9 + 10 + 11) / 16)
    assert found["live"].count == 380
    assert found["live"].stderr == pytest.approx(math.hypot(8 * 0.08, 9 * 0.09, 10 * 0.1, 11 * 0.11) / 38)
    assert found["irrelevance"].value == pytest.approx((7 + 12) / 2 / 16)
    assert found["relevance"] == Metric("relevance", 13 / 16, pytest.approx(0.13), 130)
    del values["simple_java"]
    assert "non_live" not in {metric.name for metric in bfcl.aggregates({n: [each] for n, each in values.items()})}


def test_documents_are_picked_by_index(demo: Subject, answers: Answers, asked: list[Question]) -> None:
    options = Options(categories=("parallel",), samples={"bfcl": [3, 1]}, limit=1)
    assert [sample["id"] for sample in bfcl.run(demo, answers, options).samples] == ["parallel_3", "parallel_1"]
    with pytest.raises(RequestError, match="bfcl has no document 200; they are numbered 0 to 199"):
        bfcl.run(demo, answers, Options(categories=("parallel",), samples={"bfcl": [200]}))
    with pytest.raises(RequestError, match="bfcl is asked no document"):
        bfcl.run(demo, answers, Options(categories=("parallel",), samples={"bfcl": []}))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("live_simpel", "did you mean live_simple"), ("simple_pyhton", "simple_python"), ("xyz", "known are non_live,")],
)
def test_an_unknown_category_names_the_nearest(name: str, meant: str, demo: Subject, answers: Answers) -> None:
    with pytest.raises(RequestError, match=f"bfcl has no category '{name}'") as caught:
        bfcl.run(demo, answers, Options(categories=(name,)))
    assert meant in str(caught.value)


def test_a_model_without_a_tool_format_is_refused(demo: Subject, answers: Answers) -> None:
    tokenizer = copy.copy(demo.tokenizer)
    tokenizer.chat_format = Phi35Mini()
    with pytest.raises(RequestError, match=r"demo cannot be evaluated on tools: the chat format phi3.5-mini does not"):
        bfcl.run(replace(demo, tokenizer=tokenizer), answers, Options())


@pytest.mark.slow
def test_no_question_is_asked_twice(demo: Subject, answers: Answers) -> None:
    options = Options(categories=("simple_python", "irrelevance"), limit=1, max_tokens=4)
    first = bfcl.run(demo, answers, options)
    assert len(answers) == 2
    before = answers.path.read_bytes()
    assert bfcl.run(demo, answers, options) == first
    assert answers.path.read_bytes() == before
    assert first.samples[0]["mistake"] == "the answer calls no tool" and first.samples[1]["score"] == 1

"""Arena Hard: the form of exported answers, and a local judge's verdicts in both orders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation import arena
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.asking import Question
from phi4_mlx.evaluation.options import Options
from phi4_mlx.evaluation.result import TaskResult
from phi4_mlx.evaluation.subject import Subject, load_subject
from phi4_mlx.generation.answer_batch import Answer
from tests.data.evaluation import make


@pytest.fixture(scope="module")
def subject() -> Subject:
    return load_subject("demo")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three questions, and the baseline's answers to them."""
    rows = [make.arena(number) for number in range(3)]
    baseline = [
        {"question_id": row["question_id"], "choices": [{"index": 0, "turns": [{"content": "baseline"}]}]}
        for row in rows
    ]
    for name, lines in ((arena.QUESTIONS, rows), (arena.BASELINE, baseline)):
        path = tmp_path / "data" / arena.REPOSITORY / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data"


def run(subject: Subject, tmp_path: Path, **options: Any) -> TaskResult:
    with Answers(tmp_path / "answers.jsonl") as answers:
        return arena.run(subject, answers, Options(max_tokens=4, folder=tmp_path, **options))


def test_answers_are_exported_in_the_form_of_arena_hard(subject: Subject, data: Path, tmp_path: Path) -> None:
    result = run(subject, tmp_path, data=data, samples={"arena-hard": [2, 0]})
    lines = [json.loads(line) for line in (tmp_path / "arena-hard-demo.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["own2", "own0"] == [each["id"] for each in result.samples]
    for line, sample in zip(lines, result.samples, strict=True):
        assert line.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert line["choices"] == [{"index": 0, "turns": [{"content": sample["answer"]}]}]
        assert line["model_id"] == "demo" and sample["score"] is None
    assert not result.groups


def test_a_judge_sees_each_pair_in_both_orders(
    subject: Subject, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = ["[[A>>B]]", "[[B>A]]", "[[A>B]]", "[[A>B]]", "[[A=B]]", "no verdict"]
    seen: list[Question] = []
    ask = arena.ask

    def judged(asked: Subject, questions: Sequence[Question], *rest: Any) -> list[Answer]:
        if not questions[0].prompt[0]["content"].startswith("You judge"):  # type: ignore[index]
            return ask(asked, questions, *rest)
        seen.extend(questions)
        return [Answer(text, text, "", (), "stop", 1, 1) for text in verdicts]

    monkeypatch.setattr(arena, "ask", judged)
    result = run(subject, tmp_path, data=data, judge="demo")
    wins, unclear = result.groups["judge demo"]
    assert [sample["score"] for sample in result.samples] == [1.0, 0.5, 0.5]
    assert wins.value == pytest.approx(2 / 3) and (unclear.value, unclear.count) == (1, 6)
    texts = [each.prompt[0]["content"] for each in seen]  # type: ignore[index]
    own = str(result.samples[0]["answer"])
    assert texts[0].index("baseline") > texts[0].index(f"Answer A:\n{own}")
    assert "Answer A:\nbaseline" in texts[1] and texts[1].endswith(own)


def test_questions_that_cannot_be_had_are_one_line(
    subject: Subject, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(RequestError, match=r"question.jsonl of lmarena-ai/arena-hard-auto is not on this disk"):
        run(subject, tmp_path, data=tmp_path)
    (data / arena.REPOSITORY / arena.BASELINE).write_text('{"question_id": "own0"}\n')
    with pytest.raises(RequestError, match="the answer to question own0 has no text"):
        run(subject, tmp_path, data=data, judge="demo")
    (data / arena.REPOSITORY / arena.QUESTIONS).write_text("[]\n")
    with pytest.raises(RequestError, match="line 1 is not a row of Arena Hard"):
        run(subject, tmp_path, data=data)
    with pytest.raises(RequestError, match=r"has no answer to question own1|not a row"):
        run(subject, tmp_path, data=data, judge="demo")

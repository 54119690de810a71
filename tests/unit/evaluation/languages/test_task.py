"""The task `languages` with scripted answers, and on the demo."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation import asking
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.languages.task import run
from phi4_mlx.evaluation.languages.texts import LANGUAGES, chosen
from phi4_mlx.evaluation.options import Options
from phi4_mlx.evaluation.result import TaskResult
from phi4_mlx.evaluation.subject import load_subject
from phi4_mlx.evaluation.tasks import own_task
from tests.unit.evaluation.languages.test_detector import ANSWERS

# A tokenizer that takes a token a character.
SUBJECT: Any = SimpleNamespace(tokenizer=SimpleNamespace(encode=list, chat_format=SimpleNamespace(reasons=False)))


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TaskResult, list[asking.Question]]]:
    """Runs the task with answers in the language asked; `wrong` gives others by the question's name."""

    def answer(options: Options, wrong: dict[str, str] | None = None) -> tuple[TaskResult, list[asking.Question]]:
        asked: list[asking.Question] = []

        def ask(subject: Any, questions: Sequence[asking.Question], *rest: Any) -> list[asking.Answer]:
            asked.extend(questions)
            texts = [(wrong or {}).get(question.name, ANSWERS[question.name[:2]]) for question in questions]
            return [asking.Answer(text, text, "", (), "stop", 9, 9) for text in texts]

        monkeypatch.setattr(asking, "ask", ask)
        return run(SUBJECT, SimpleNamespace(), options), asked  # type: ignore[arg-type]

    return answer


def test_each_language_has_its_scores(answered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    wrong = {"da-1": ANSWERS["no"], "fr-2": "", "ja-5": LANGUAGES["ja"].questions[4], "th-3": ANSWERS["th"] * 5}
    result, asked = answered(Options(folder=tmp_path / "new"), wrong)
    assert result.task == "languages" and own_task("languages") is run
    assert len(asked) == 23 * 5 and [*result.groups] == [*LANGUAGES]
    assert {each["id"]: each["answers"][0]["fault"] for each in result.samples if each["score"] < 1} == {
        "da-1": "language", "fr-2": "empty", "ja-5": "copy", "th-3": "loop",
    }  # fmt: skip
    assert result.main.name == "right" and result.main.value == pytest.approx(111 / 115)
    values = {code: metrics[0].value for code, metrics in result.groups.items()}
    assert {code for code, value in values.items() if value == 0.8} == {"da", "fr", "ja", "th"}
    assert set(values.values()) == {0.8, 1.0}
    danish = next(each for each in result.samples if each["id"] == "da-1")
    assert danish["answers"][0]["found"] == "no" and danish["in_language"] == 0
    assert all(metrics[2].value == 1 for metrics in result.groups.values())  # tokens a character
    assert result.note == (
        "empty: 1, copy: 1, loop: 1, language: 1; tokens of each language in languages.md; "
        "no picture: pip install 'matplotlib>=3.8'"
    )
    page = (tmp_path / "new" / "languages.md").read_text(encoding="utf-8")
    assert "| da-1 | language | no |" in page and "| Thai | – |" in page
    assert TaskResult.from_json(result.to_json()) == result


@pytest.mark.slow
def test_the_picture_is_drawn(answered: Any, tmp_path: Path) -> None:
    result, _ = answered(Options(folder=tmp_path, languages=("de", "ja")))
    assert (
        result.note == "tokens of each language in languages.md"
        and (tmp_path / "languages.png").stat().st_size > 10_000
    )


def test_a_limit_goes_round_the_languages(answered: Any) -> None:
    result, asked = answered(Options(limit=25))
    assert [question.name for question in asked][-3:] == ["zh-1", "ar-2", "cs-2"]
    assert set(result.groups) == set(LANGUAGES)
    result, asked = answered(Options(limit=3, languages=("DE", "finnish")))
    assert [question.name for question in asked] == ["de-1", "fi-1", "de-2"]
    assert [*result.groups] == ["de", "fi"]


def test_documents_by_number(answered: Any) -> None:
    _, asked = answered(Options(samples={"languages": [24, 0, 24]}, limit=1))
    assert [question.name for question in asked] == ["cs-2", "ar-1"]


def test_sampling_is_repeated_with_other_seeds(answered: Any) -> None:
    options = Options(languages=("sv",), limit=2, temp=0.8, top_p=0.95, repeats=3, seed=7, max_tokens=99)
    result, asked = answered(options)
    assert [(each.name, each.seed) for each in asked] == [(f"sv-{n}", 7 + at) for n in (1, 2) for at in range(3)]
    assert {(each.temp, each.top_p, each.max_tokens) for each in asked} == {(0.8, 0.95, 99)}
    assert [(sample["id"], len(sample["answers"])) for sample in result.samples] == [("sv-1", 3), ("sv-2", 3)]
    assert result.main.count == 2  # answers to one question are not independent
    result, asked = answered(Options(languages=("sv",), limit=2, repeats=3))
    assert len(asked) == 2 and result.settings["repeats"] == 1  # without sampling, each would be the same


@pytest.mark.parametrize(("reasons", "given", "room"), [(False, None, 256), (True, None, 4352), (True, 50, 50)])
def test_a_model_that_reasons_has_room_for_it(
    answered: Any, monkeypatch: pytest.MonkeyPatch, reasons: bool, given: int | None, room: int
) -> None:
    monkeypatch.setattr(SUBJECT.tokenizer.chat_format, "reasons", reasons)
    _, asked = answered(Options(limit=1, max_tokens=given))
    assert asked[0].max_tokens == room


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(languages=("de", "norvegian")), "'norvegian' is unknown.*did you mean norwegian"),
        (Options(languages=("jp",)), "'jp' is unknown; known are ar, cs, .*ja"),
        (Options(languages=("",)), "'' is unknown"),
        (Options(samples={"languages": [115]}), "115 is not a document; they have numbers from 0 to 114"),
        (Options(samples={"languages": [0]}, languages=("zh",)), "no document"),
        (Options(samples={"languages": []}), "no document"),
    ],
)
def test_what_cannot_be_asked_is_refused(answered: Any, options: Options, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        answered(options)


def test_languages_are_found_by_code_and_name() -> None:
    assert [language.code for language in chosen(("uk", "German", " AR ", "de"))] == ["ar", "de", "uk"]
    assert chosen(()) == [*LANGUAGES.values()]


def test_a_stopped_run_on_the_demo_goes_on(tmp_path: Path) -> None:
    subject, file = load_subject("demo"), tmp_path / "answers.jsonl"
    options = Options(languages=("en", "de"), max_tokens=3, limit=4)
    with Answers(file) as answers:
        run(subject, answers, replace(options, limit=2))
        assert len(answers) == 2
        first = run(subject, answers, options)
        before = file.read_bytes()
    with Answers(file) as answers:
        assert run(subject, answers, options) == first
    assert file.read_bytes() == before and before.count(b"\n") == 4
    assert first.groups["de"][2].value > first.groups["en"][2].value

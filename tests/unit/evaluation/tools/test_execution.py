"""The task `tools`: questions in JSON Lines, and answers whose calls are run."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx import run_tools
from phi4_mlx.agent import AgentResult
from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.options import Options
from phi4_mlx.evaluation.subject import Subject, load_subject
from phi4_mlx.evaluation.tools import execution
from phi4_mlx.evaluation.tools.questions import load_questions
from phi4_mlx.tokens.chat_format import Phi35Mini
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.toolbox import Toolbox
from tests.conftest import ROOT

DATA = ROOT / "tests" / "data" / "evaluation" / "tools"
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x", "y"],
        },
    },
}  # fmt: skip
LINE = {
    "messages": [{"role": "user", "content": "How much is 1 and 2?"}], "tools": [TOOL],
    "results": [{"name": "add", "result": "3"}], "answer": "3",
}  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> Subject:
    return load_subject("demo")


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[Answers]:
    with Answers(tmp_path / "tools.jsonl") as opened:
        yield opened


def written(folder: Path, *lines: Any, functions: str = "") -> Path:
    """A folder with questions, and with functions if they are given."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text)
    if functions:
        (folder / "functions.py").write_text(functions)
    return folder


def results(folder: Path, subject: Subject, *calls: dict[str, Any]) -> list[str]:
    """The result of the first question's tool `add` for arguments."""
    (question,) = load_questions(folder, subject.tokenizer).items
    box = Toolbox(question.tools)
    return [box.run(ToolCall("add", arguments)) for arguments in calls]


@pytest.mark.slow
def test_the_same_answers_as_run_tools_alone(demo: Subject, answers: Answers) -> None:
    result = execution.run(demo, answers, Options(data=DATA, limit=3))
    questions = load_questions(DATA, demo.tokenizer).items[:3]
    alone = [run_tools(demo.model, demo.tokenizer, each.messages, each.tools, max_tokens=512) for each in questions]
    assert [sample["text"] for sample in result.samples] == [each.text for each in alone]
    right = [given.text == question.answer for given, question in zip(alone, questions, strict=True)]
    assert [sample["score"] for sample in result.samples] == right
    assert result.main.value == 1.0 and result.main.count == 3
    assert {name: metric.count for name, (metric,) in result.groups.items()} == {
        "arithmetic": 1, "conversion": 1, "lookup": 1,
    }  # fmt: skip
    assert result.samples[0]["messages"][0]["tool_calls"][0]["function"]["name"]


def test_no_question_is_asked_twice(demo: Subject, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(data=DATA, categories=("lookup",), limit=1)
    first = execution.run(demo, answers, options)
    before = answers.path.read_bytes()
    assert len(answers) == 1
    monkeypatch.setattr(execution, "run_tools", None)
    assert execution.run(demo, answers, options) == first
    assert answers.path.read_bytes() == before


def test_a_run_that_was_stopped_goes_on(demo: Subject, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(model: Any, tokenizer: Any, messages: list[Any], tools: Any, **options: Any) -> AgentResult:
        asked.append(messages)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return AgentResult(f"answer {len(asked)}", list(messages), 1, "stop")

    monkeypatch.setattr(execution, "run_tools", run)
    with pytest.raises(KeyboardInterrupt):
        execution.run(demo, answers, Options(data=DATA))
    assert len(answers) == 2
    result = execution.run(demo, answers, Options(data=DATA))
    assert len(asked) == 13 and asked[2] == asked[3]  # the one that was stopped is asked again, and no other
    assert [sample["text"] for sample in result.samples[:3]] == ["answer 1", "answer 2", "answer 4"]


def test_other_functions_are_other_questions(demo: Subject, answers: Answers, tmp_path: Path) -> None:
    line = {key: value for key, value in LINE.items() if key != "results"}
    for body in ("3", "4"):
        written(tmp_path, line, functions=f"def add(x, y): return {body}\n")
        execution.run(demo, answers, Options(data=tmp_path, max_tokens=1))
    assert len(answers) == 2


def test_a_wrong_answer_scores_nothing(demo: Subject, answers: Answers, tmp_path: Path) -> None:
    result = execution.run(demo, answers, Options(data=written(tmp_path, LINE), max_tokens=1))
    assert result.main.value == 0 and result.samples[0]["finish_reason"] == "length" and not result.groups


def test_a_right_answer_that_is_corrected_asks_nothing_again(demo: Subject, answers: Answers, tmp_path: Path) -> None:
    for line in ({"answer": "4"}, {"answer": "3", "category": "sums", "id": "one"}):
        execution.run(demo, answers, Options(data=written(tmp_path, LINE | line)))
    assert len(answers) == 1


def test_recorded_results_hold_for_their_arguments(demo: Subject, tmp_path: Path) -> None:
    recorded = [{"name": "add", "arguments": {"x": 1, "y": 2}, "result": {"sum": 3}}]
    folder = written(tmp_path, {**LINE, "results": recorded})
    assert results(folder, demo, {"x": 1, "y": 2}, {"y": 2, "x": 1}, {"x": 2, "y": 2}) == [
        '{"sum": 3}', '{"sum": 3}', "error: no result is recorded for these arguments",
    ]  # fmt: skip
    written(folder, {**LINE, "results": recorded}, functions="def add(x, y): return x + y\n")
    assert results(folder, demo, {"x": 1, "y": 2}, {"x": 2, "y": 2}) == ['{"sum": 3}', "4"]


def test_a_function_of_another_name_takes_the_arguments_in_order(demo: Subject, tmp_path: Path) -> None:
    source = "def minus(a, b=10): return a - b\n"
    line = {**LINE, "results": [], "functions": {"add": "minus"}}
    assert results(written(tmp_path, line, functions=source), demo, {"y": 2, "x": 9}, {"x": 1}) == ["7", "-9"]


def test_without_declarations_every_function_is_a_tool(demo: Subject, tmp_path: Path) -> None:
    line = {"messages": LINE["messages"], "answer": "3"}
    source = "def add(x: int, y: int) -> int:\n    return x + y\ndef less(x: int) -> int:\n    return x - 1\n"
    (question,) = load_questions(written(tmp_path, line, functions=source), demo.tokenizer).items
    assert [each["function"]["name"] for each in Toolbox(question.tools).declarations] == ["add", "less"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tools": [{"type": "function", "function": {"description": "Adds."}}]}, "a tool needs a name"),
        ({"tools": []}, '"tools" is empty'),
        ({"tools": "add"}, "tools must be a list"),
        ({"tools": [TOOL, TOOL]}, "two tools are called 'add'"),
        ({"messages": []}, '"messages" must be a list'),
        ({"messages": ["Hello"]}, "message 0 must be an object with role and content"),
        ({"messages": [{"role": "nobody", "content": ""}]}, "nobody"),
        ({"answer": 3}, '"answer" must be the text of the right answer, not 3'),
        ({"answer": ""}, '"answer" must be the text'),
        ({"anwser": "3"}, "the key 'anwser' is not known; did you mean answer?"),
        ({"results": [{"name": "ad", "result": ""}]}, "'ad', which is not one of its tools"),
        ({"results": [{"name": "add"}]}, "a recorded result has"),
        ({"results": [{"name": "add", "result": "", "arguments": 1}]}, "a recorded result has"),
        ({"results": []}, "tool 'add' has no recorded result"),
        ({"results": {}}, '"results" must be a list'),
        ({"functions": ["add"]}, '"functions" must be an object'),
        ({"functions": {"add": "plus"}}, "functions.py defines no function 'plus'"),
        ({"functions": {"less": "plus"}}, "'less', which is not one of its tools"),
        ({"id": ["a"]}, '"id" and "category" must be texts'),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named(changed: dict[str, Any], told: str, demo: Subject, tmp_path: Path) -> None:
    folder = written(tmp_path, LINE, {**LINE, **changed})
    with pytest.raises(RequestError) as caught:
        load_questions(folder, demo.tokenizer)
    assert str(caught.value).startswith(f"{folder / 'questions.jsonl'}:2: ")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (['{"messages": ['], "questions.jsonl:1: not JSON"),
        (["[]"], "questions.jsonl:1: holds [], not an object"),
        ([], "is empty"),
        ([{**LINE, "id": "a"}, {**LINE, "id": "a"}], "questions.jsonl:2: the id 'a' occurs twice"),
    ],
)
def test_a_damaged_file_is_named(lines: list[Any], told: str, demo: Subject, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        load_questions(written(tmp_path, *lines), demo.tokenizer)
    assert told in str(caught.value)


def test_missing_data_is_named(demo: Subject, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"the task tools needs --data: a folder with questions.jsonl"):
        load_questions(None, demo.tokenizer)
    with pytest.raises(RequestError, match=r"questions.jsonl does not exist"):
        load_questions(tmp_path, demo.tokenizer)
    with pytest.raises(RequestError, match=r"functions.py, line 1: NameError"):
        load_questions(written(tmp_path, LINE, functions="missing\n"), demo.tokenizer)


def test_an_unknown_category_names_the_nearest(demo: Subject, answers: Answers) -> None:
    with pytest.raises(RequestError, match=r"no category 'lokup'; did you mean lookup\?"):
        execution.run(demo, answers, Options(data=DATA, categories=("lokup",)))


def test_a_model_without_a_tool_format_is_refused(demo: Subject, answers: Answers) -> None:
    tokenizer = copy.copy(demo.tokenizer)
    tokenizer.chat_format = Phi35Mini()
    with pytest.raises(RequestError, match=r"demo cannot be evaluated on tools: the chat format phi3.5-mini does not"):
        execution.run(replace(demo, tokenizer=tokenizer), answers, Options(data=DATA))


@pytest.mark.slow
def test_the_fixture_is_what_its_recipe_writes(tmp_path: Path) -> None:
    command = [sys.executable, "tests/bench/tools.py", "--write", str(tmp_path), "--count", "12"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 0
    for name in ("questions.jsonl", "functions.py"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()

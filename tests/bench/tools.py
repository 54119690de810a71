"""Tools on the demo: share of right answers when its calls are executed, and of required calls that are valid.

    python tests/bench/tools.py [--count 300] [--model demo]
    python tests/bench/tools.py --write FOLDER [--count 300]

Each held-out question is asked by `python -m phi4_mlx evaluate --tasks tools`, with its declared tools as Python
functions that compute what the training corpus computed. An answer counts if it matches exactly. The same number of
answers is then drawn at temperature 1 with `tool_choice` set, half to "required" and half to one tool's name, and the
calls are checked with jsonschema. Bars: 95 % and 100 %. The last line is JSON. --write only writes the questions, as
data for the command.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
from demo_world import Draw, corpus, toolbox
from harness import ROOT, last_line, option_parser, timed

from phi4_mlx import Tokenizer, make_sampler, run_tools
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.options import Options
from phi4_mlx.evaluation.result import TaskResult
from phi4_mlx.evaluation.subject import Subject, load_subject
from phi4_mlx.evaluation.tools import execution
from phi4_mlx.models.text import Model

SEED = 7
SKILLS = ("arithmetic", "conversion", "lookup")
FUNCTIONS = ROOT / "tests" / "data" / "evaluation" / "tools" / "functions.py"


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question, its tools, the recorded result of its call, and the right answer."""

    skill: str
    messages: list[corpus.Message]
    tools: list[toolbox.Tool]
    recorded: str
    answer: str

    def line(self, number: int) -> dict[str, Any]:
        """The question as data for `evaluate`: tools that compute, and a recorded result for the others."""
        form = ""
        if self.recorded.startswith("{"):
            form = f"_{next(iter(json.loads(self.recorded)))}" + ("" if ": " in self.recorded else "_dense")
        computed = {tool.name: tool.kind + form for tool in self.tools if tool.kind in ("calculate", "convert")}
        if self.recorded.startswith("error: "):  # every call fails
            computed = {}
        results = [{"name": tool.name, "result": self.recorded} for tool in self.tools if tool.name not in computed]
        declared = [tool.declaration for tool in self.tools]
        return {
            "id": f"{self.skill}-{number}", "category": self.skill, "messages": self.messages, "tools": declared,
            "functions": computed, "results": results, "answer": self.answer,
        }  # fmt: skip


def questions(seed: int, count: int) -> list[Question]:
    """Held-out questions that need a tool, from each skill in turn."""
    draw = Draw(f"tools {seed}", held_out=True)
    made: list[Question] = []
    while len(made) < count:
        skill = SKILLS[len(made) % len(SKILLS)]
        talk = corpus.begin(draw, tools=True)
        start = len(talk.messages)
        corpus.add_turn(talk, [skill])
        if talk.messages[-2]["role"] == "tool":  # else no tool for this skill is declared
            recorded, answer = (message["content"] for message in talk.messages[-2:])
            made.append(Question(skill, talk.messages[: start + 1], talk.tools, recorded, answer))
    return made


def write(folder: Path, asked: list[Question]) -> None:
    """Writes questions as data for `python -m phi4_mlx evaluate --tasks tools`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(question.line(number)) + "\n" for number, question in enumerate(asked)]
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    if not (folder / FUNCTIONS.name).exists():
        shutil.copy(FUNCTIONS, folder)


def right_answers(subject: Subject, asked: list[Question], mistakes: int) -> TaskResult:
    """The task `tools` on the questions; prints the first `mistakes` wrong ones."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), asked)
        with Answers(Path(name) / "answers.jsonl") as answers:
            result = execution.run(subject, answers, Options(data=Path(name)))
    wrong = [(question, sample) for question, sample in zip(asked, result.samples, strict=True) if not sample["score"]]
    for question, sample in wrong[:mistakes]:
        print(f"{question.skill}: {question.messages[-1]['content']!r}")
        print(f"  right {sample['answer']!r}\n  given {sample['text']!r}")
        print(f"  messages {json.dumps(sample['messages'])}")
    return result


def valid_calls(model: Model, tokenizer: Tokenizer, asked: list[Question]) -> tuple[int, int]:
    """Answers whose calls are all valid: (with any tool required, with one tool required by name)."""
    sampler = make_sampler(temp=1.0, seed=SEED)
    valid = [0, 0]
    for number, question in enumerate(asked):
        by_name = number % 2
        schemas = {tool.name: tool.declaration["function"]["parameters"] for tool in question.tools}
        tools = [(tool.declaration, print) for tool in question.tools]  # with one round, no call is run
        name = sorted(schemas)[0]
        result = run_tools(
            model, tokenizer, [{"role": "user", "content": question.answer}], tools,
            tool_choice=name if by_name else "required", max_rounds=1, max_tokens=160, sampler=sampler,
        )  # fmt: skip
        calls = [call["function"] for call in result.messages[1].get("tool_calls", [])]
        closed = [{**schemas[call["name"]], "additionalProperties": False} for call in calls]
        good = all(
            jsonschema.Draft202012Validator(schema).is_valid(json.loads(call["arguments"]))
            for call, schema in zip(calls, closed, strict=True)
        )
        valid[by_name] += bool(calls) and good and (not by_name or [call["name"] for call in calls] == [name])
    return valid[0], valid[1]


def main() -> None:
    """Prints the first mistakes and a line for each skill, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--mistakes", type=int, default=5, help="number of wrong answers to print")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the questions there, and ask none")
    options = parser.parse_args()
    asked = questions(SEED, options.count)
    if options.write:
        return write(options.write, asked)
    subject = load_subject(options.model)
    result, answers_s = timed(right_answers, subject, asked, options.mistakes)
    (required, by_name), calls_s = timed(valid_calls, subject.model, subject.tokenizer, asked)
    for skill, (metric,) in result.groups.items():
        print(f"{skill}: {round(metric.value * metric.count)} of {metric.count}")
    percent = 100 * result.main.value
    halves = (len(asked) + 1) // 2, len(asked) // 2
    last_line(
        "tools",
        right_percent=round(percent, 1),
        right=round(result.main.value * len(asked)),
        questions=len(asked),
        required_valid=[required, halves[0]],
        by_name_valid=[by_name, halves[1]],
        s_an_answer=round(answers_s / len(asked), 2),
        s_a_required_call=round(calls_s / len(asked), 2),
        ok=percent >= 95 and (required, by_name) == halves,
    )


if __name__ == "__main__":
    main()

"""Tools on the demo: share of right answers when its calls are executed, and of required calls that are valid.

    python tests/bench/tools.py [--count 300] [--model demo]

Each held-out question is asked through `run_tools`, with its declared tools as Python functions that compute what the
training corpus computed. An answer counts if it matches exactly. The same number of answers is then drawn at
temperature 1 with `tool_choice` set, half to "required" and half to one tool's name, and the calls are checked with
jsonschema. Bars: 95 % and 100 %. The last line is JSON.
"""

from __future__ import annotations

import ast
import json
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema
from demo_world import Draw, corpus, toolbox, words
from harness import last_line, option_parser, timed

from phi4_mlx import Tokenizer, load, make_sampler, run_tools
from phi4_mlx.models.text import Model

SEED = 7
SKILLS = ("arithmetic", "conversion", "lookup")
OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}
SIZES = {name: size for dimension in words.DIMENSIONS for names, size in dimension.items() for name in names}


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question, its tools as (declaration, function), and the one right answer."""

    skill: str
    messages: list[corpus.Message]
    tools: list[tuple[dict[str, Any], Callable[..., str]]]
    answer: str


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
            recorded = talk.messages[-2]["content"]
            tools = [(tool.declaration, function(tool, recorded)) for tool in talk.tools]
            made.append(Question(skill, talk.messages[: start + 1], tools, talk.messages[-1]["content"]))
    return made


def function(tool: toolbox.Tool, recorded: str) -> Callable[..., str]:
    """The tool as a function. It fails if the recorded call failed, and formats its result as recorded."""

    def work(**arguments: Any) -> str:
        if recorded.startswith("error: "):
            return recorded
        values = [arguments[name] for name in tool.arguments]
        if tool.kind in ("weather", "clock"):  # nothing to compute
            return recorded
        return in_form(recorded, calculate(*values) if tool.kind == "calculate" else convert(*values))

    return work


def in_form(recorded: str, result: str) -> str:
    """A result in the format of the recorded one: bare, or in a JSON object."""
    if not recorded.startswith("{"):
        return result
    key = next(iter(json.loads(recorded)))
    return f'{{"{key}":{" " if ": " in recorded else ""}{result}}}'


def calculate(expression: str) -> str:
    """Evaluates sums, differences, products and quotients of numbers."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return float(node.value)
        raise ValueError(f"{expression!r} is not arithmetic")

    return toolbox.shown(value(ast.parse(expression, mode="eval").body))


def convert(value: float, source: str, target: str) -> str:
    """Converts between units."""
    sizes = (0.0, 0.0) if source in words.TEMPERATURE else (SIZES[source], SIZES[target])
    return toolbox.shown(toolbox.convert(value, source, target, *sizes))


def right_answers(model: Model, tokenizer: Tokenizer, asked: list[Question], mistakes: int) -> Counter[str]:
    """Counts exact answers by skill; prints the first `mistakes` wrong ones."""
    right: Counter[str] = Counter()
    for question in asked:
        result = run_tools(model, tokenizer, question.messages, question.tools, max_tokens=160)
        right[question.skill] += result.text == question.answer
        if result.text != question.answer and mistakes > 0:
            mistakes -= 1
            print(f"{question.skill}: {question.messages[-1]['content']!r}")
            print(f"  right {question.answer!r}\n  given {result.text!r}")
            print(f"  messages {json.dumps(result.messages[len(question.messages) :])}")
    return right


def valid_calls(model: Model, tokenizer: Tokenizer, asked: list[Question]) -> tuple[int, int]:
    """Answers whose calls are all valid: (with any tool required, with one tool required by name)."""
    sampler = make_sampler(temp=1.0, seed=SEED)
    valid = [0, 0]
    for number, question in enumerate(asked):
        by_name = number % 2
        schemas = {each["function"]["name"]: each["function"]["parameters"] for each, _ in question.tools}
        name = sorted(schemas)[0]
        result = run_tools(
            model, tokenizer, [{"role": "user", "content": question.answer}], question.tools,
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
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    asked = questions(SEED, options.count)
    right, answers_s = timed(right_answers, model, tokenizer, asked, options.mistakes)
    (required, by_name), calls_s = timed(valid_calls, model, tokenizer, asked)
    of_skill = Counter(question.skill for question in asked)
    for skill in SKILLS:
        print(f"{skill}: {right[skill]} of {of_skill[skill]}")
    percent = 100 * sum(right.values()) / len(asked)
    halves = (len(asked) + 1) // 2, len(asked) // 2
    last_line(
        "tools",
        right_percent=round(percent, 1),
        questions=len(asked),
        required_valid=[required, halves[0]],
        by_name_valid=[by_name, halves[1]],
        s_an_answer=round(answers_s / len(asked), 2),
        s_a_required_call=round(calls_s / len(asked), 2),
        ok=percent >= 95 and (required, by_name) == halves,
    )


if __name__ == "__main__":
    main()

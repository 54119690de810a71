"""How often the demo, with tools that really run, comes to the right answer; and whether required calls are valid.

    python tests/bench/tools.py [--count 300] [--model demo]

Held-out questions of the demo's world, each asked through `run_tools` with the tools that it declares, as Python
functions that compute what the training's would. Right is right to the letter. Then as many calls that are required,
half of them of one tool by its name, whatever is said, sampled at temperature 1 and checked with jsonschema. The bars:
95 % and 100 %. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

import corpus
import jsonschema
import toolbox
import words
from draw import Draw

from phi4_mlx import load, make_sampler, run_tools

SEED = 7
SKILLS = ("arithmetic", "conversion", "lookup")
SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SIZES = {name: size for dimension in words.DIMENSIONS for names, size in dimension.items() for name in names}


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question, its tools as functions, and the one right answer."""

    skill: str
    messages: list[corpus.Message]
    tools: list[tuple[dict[str, Any], Callable[..., str]]]
    answer: str


def questions(seed: int, count: int) -> list[Question]:
    """Held-out questions that need a tool, the skills in turn."""
    draw = Draw(f"tools {seed}", held_out=True)
    made: list[Question] = []
    while len(made) < count:
        skill = SKILLS[len(made) % len(SKILLS)]
        talk = corpus.begin(draw, tools=True)
        start = len(talk.messages)
        corpus.add_turn(talk, [skill])
        if talk.messages[-2]["role"] == "tool":  # else the tool for it is not declared
            recorded = talk.messages[-2]["content"]
            tools = [(tool.declaration, function(tool, recorded)) for tool in talk.tools]
            made.append(Question(skill, talk.messages[: start + 1], tools, talk.messages[-1]["content"]))
    return made


def function(tool: toolbox.Tool, recorded: str) -> Callable[..., str]:
    """A tool that works, or fails if the recorded one did; its results have the form of the recorded one."""

    def work(**arguments: Any) -> str:
        if recorded.startswith("error: "):
            return recorded
        values = [arguments[name] for name in tool.arguments]
        if tool.kind in ("weather", "clock"):  # there is nothing to compute
            return recorded
        return in_form(recorded, calculate(*values) if tool.kind == "calculate" else convert(*values))

    return work


def in_form(recorded: str, result: str) -> str:
    """A result as the recorded one was written: bare, or in an object."""
    if not recorded.startswith("{"):
        return result
    key = next(iter(json.loads(recorded)))
    return f'{{"{key}":{" " if ": " in recorded else ""}{result}}}'


def calculate(expression: str) -> str:
    def value(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp):
            return SIGNS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return float(node.value)
        raise ValueError(f"{expression!r} is no sum")

    return toolbox.shown(value(ast.parse(expression, mode="eval").body))


def convert(value: float, source: str, target: str) -> str:
    sizes = (0.0, 0.0) if source in words.TEMPERATURE else (SIZES[source], SIZES[target])
    return toolbox.shown(toolbox.convert(value, source, target, *sizes))


def answers(model: Any, tokenizer: Any, asked: list[Question], mistakes: int) -> Counter[str]:
    """How many are right, by skill; prints the first few mistakes."""
    right: Counter[str] = Counter()
    for question in asked:
        result = run_tools(model, tokenizer, question.messages, question.tools, max_tokens=160)
        right[question.skill] += result.text == question.answer
        if result.text != question.answer and mistakes > 0:
            mistakes -= 1
            print(f"{question.skill}: {question.messages[-1]['content']!r}")
            print(f"  right {question.answer!r}\n  given {result.text!r}")
            print(f"  said {json.dumps(result.messages[len(question.messages) :])}")
    return right


def valid_calls(model: Any, tokenizer: Any, asked: list[Question]) -> tuple[int, int]:
    """Required answers whose every call is valid: (of any tool, of one by name)."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--mistakes", type=int, default=5, help="how many to show")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    asked = questions(SEED, options.count)
    start = time.perf_counter()
    right = answers(model, tokenizer, asked, options.mistakes)
    answered = time.perf_counter()
    required, by_name = valid_calls(model, tokenizer, asked)
    called = time.perf_counter()
    of_skill = Counter(question.skill for question in asked)
    for skill in SKILLS:
        print(f"{skill}: {right[skill]} of {of_skill[skill]}")
    percent = 100 * sum(right.values()) / len(asked)
    halves = (len(asked) + 1) // 2, len(asked) // 2
    result = {
        "bench": "tools",
        "right_percent": round(percent, 1),
        "questions": len(asked),
        "required_valid": [required, halves[0]],
        "by_name_valid": [by_name, halves[1]],
        "s_an_answer": round((answered - start) / len(asked), 2),
        "s_a_required_call": round((called - answered) / len(asked), 2),
        "ok": percent >= 95 and (required, by_name) == halves,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

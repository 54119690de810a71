"""Questions in JSON Lines whose tools can be run: from functions of a Python file, or from recorded results."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4_mlx.data.jsonl import read_lines
from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.files.user_file import read_file
from phi4_mlx.terminal.amount import amount
from phi4_mlx.terminal.suggestion import path_suggestion, suggestion
from phi4_mlx.tokens.tokenizer import Tokenizer
from phi4_mlx.tools.declarations import check_tools
from phi4_mlx.tools.python_file import tool_functions
from phi4_mlx.tools.toolbox import Tool, Toolbox, error_text

QUESTIONS, FUNCTIONS = "questions.jsonl", "functions.py"
_KEYS = ("id", "category", "messages", "tools", "functions", "results", "answer")
Functions = Mapping[str, Callable[..., Any]]
_NOT_RECORDED = error_text("no result is recorded for these arguments")


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question, its tools, and the right answer.

    Attributes:
        name: unique among the questions.
        category: for the breakdown, or "".
        messages: the conversation.
        tools: as `run_tools` takes them.
        answer: what the last answer must be, to the letter.
        line: the whole question as JSON.
    """

    name: str
    category: str
    messages: list[JsonObject]
    tools: list[Tool]
    answer: str
    line: JsonObject


@dataclass(frozen=True)
class Questions:
    """The questions of a file.

    Attributes:
        items: in order.
        functions_sha256: of the Python file, or "" without one.
    """

    items: list[Question]
    functions_sha256: str


def find_questions(data: Path | None) -> Path:
    """The file of questions that `data` stands for.

    Raises:
        RequestError: there is none.
    """
    if data is None:
        raise RequestError(f"the task tools needs --data: a folder with {QUESTIONS}, and {FUNCTIONS} for its tools")
    data = data.expanduser()
    path = data / QUESTIONS if data.is_dir() else data
    if not os.path.exists(path):
        near = path_suggestion(str(data), lambda name: (Path(name) / QUESTIONS).exists() or name.endswith(".jsonl"))
        raise RequestError(f"{path} does not exist{near}")
    return path


def load_questions(data: Path | None, tokenizer: Tokenizer) -> Questions:
    """Reads questions, and runs the Python file with their functions.

    Each line is an object:

        "messages": the conversation up to the answer.
        "answer":   the text of the right answer.
        "tools":    declarations, in OpenAI's form or the flat one; without it, every function of the Python file.
        "results":  [{"name": a tool, "arguments": {...}, "result": ...}], recorded results; one without "arguments"
                    holds for all of them.
        "functions": {tool: function of the Python file}, where their names differ; the function's parameters then take
                    the declared arguments in order.
        "id", "category": optional.

    Args:
        data: a folder with `questions.jsonl` and, if a line needs it, `functions.py`; or the first of these.
        tokenizer: of the model.

    Raises:
        RequestError: a file is missing or a line is malformed; names the file and the line.
    """
    path = find_questions(data)
    file = path.with_name(FUNCTIONS)
    functions: Functions = {}
    digest = ""
    if file.exists():
        functions = {function.__name__: function for function in tool_functions(str(file))}
        digest = hashlib.sha256(read_file(file)).hexdigest()
    names: set[str] = set()

    def read(line: JsonObject, source: str) -> Question:
        question = _question(line, source.rpartition(":")[2], functions, tokenizer)
        if question.name in names:
            raise RequestError(f"the id {question.name!r:.100} occurs twice; each question needs one of its own")
        names.add(question.name)
        return question

    return Questions(read_lines(path, read), digest)


def _question(line: JsonObject, number: str, functions: Functions, tokenizer: Tokenizer) -> Question:
    for key in line:
        if key not in _KEYS:
            near = suggestion(key, _KEYS) or f"; known are {', '.join(_KEYS)}"
            raise RequestError(f"the key {key!r:.100} is not known{near}")
    messages, answer, category = line.get("messages"), line.get("answer"), line.get("category", "")
    if not isinstance(messages, list) or not messages:
        raise RequestError('"messages" must be a list with at least one message')
    if not isinstance(answer, str) or not answer:
        raise RequestError(f'"answer" must be the text of the right answer, not {answer!r:.100}')
    name = line.get("id", number)
    if not isinstance(name, (str, int)) or not isinstance(category, str):
        raise RequestError('"id" and "category" must be texts')
    tools = _tools(line, functions)
    tokenizer.apply_chat_template(messages, tools=Toolbox(tools).declarations)
    return Question(str(name), category, messages, tools, answer, line)


def _tools(line: JsonObject, functions: Functions) -> list[Tool]:
    if "tools" not in line:
        if not functions:
            raise RequestError(f'it has no "tools", and there is no {FUNCTIONS} beside it')
        return list(functions.values())
    declared = {each["function"]["name"]: each for each in check_tools(line["tools"])}
    if not declared:
        raise RequestError('"tools" is empty; declare at least one tool')
    results, others = line.get("results", []), line.get("functions", {})
    if not isinstance(results, list) or not all(isinstance(each, dict) for each in results):
        raise RequestError('"results" must be a list of {"name": ..., "arguments": ..., "result": ...}')
    if not isinstance(others, dict):
        raise RequestError('"functions" must be an object of tools and the functions that they run')
    for name in [*(each.get("name") for each in results), *others]:
        if name not in declared:
            raise RequestError(f"it has a result or a function of {name!r:.100}, which is not one of its tools")
    tools: list[Tool] = []
    for name, tool in declared.items():
        recorded = [each for each in results if each["name"] == name]
        function = _function(tool["function"], others.get(name), functions)
        if function is None and not recorded:
            raise RequestError(f"tool {name!r} has no recorded result, and {FUNCTIONS} defines no function for it")
        tools.append((tool, function if function and not recorded else _recorded(recorded, function)))
    return tools


def _function(declared: JsonObject, other: Any, functions: Functions) -> Callable[..., Any] | None:
    """The function that a tool runs; None if the Python file has none of its name."""
    if other is None:
        return functions.get(declared["name"])
    if not isinstance(other, str) or other not in functions:
        raise RequestError(f"{FUNCTIONS} defines no function {other!r:.100}{suggestion(str(other), functions)}")
    arguments, parameters = [*declared["parameters"]["properties"]], [*inspect.signature(functions[other]).parameters]
    if len(arguments) != len(parameters):
        raise RequestError(
            f"tool {declared['name']!r} declares {amount(len(arguments), 'argument')}, and its function {other} takes "
            f"{len(parameters)}"
        )
    renamed = dict(zip(arguments, parameters, strict=True))

    def run(**given: Any) -> Any:
        return functions[other](**{renamed[name]: value for name, value in given.items()})

    return run


def _recorded(results: list[JsonObject], function: Callable[..., Any] | None) -> Callable[..., Any]:
    """A function that gives recorded results, and runs another one where none is recorded."""
    for each in results:
        known = {"name", "result"} <= each.keys() <= {"name", "result", "arguments"}
        if not known or not isinstance(each.get("arguments", {}), dict):
            raise RequestError(f'a recorded result has "name", "result" and perhaps "arguments", not {each!r:.100}')

    def run(**given: Any) -> Any:
        for each in results:
            if each.get("arguments", given) == given:
                return each["result"]
        return _NOT_RECORDED if function is None else function(**given)

    return run

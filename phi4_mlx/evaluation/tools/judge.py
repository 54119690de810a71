"""Right or wrong: the calls in an answer to a question of the leaderboard."""

from __future__ import annotations

import re
from collections.abc import Sequence

from phi4_mlx.evaluation.tools.leaderboard import LANGUAGES, Case, Leaderboard
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.markup import CALLS_OPEN

# Values in Java or JavaScript that are not checked: the checker's patterns take exponential time in arrays, or the
# fifth power of a run of spaces, where they do not match. The longest right value has 152 characters.
_MAX_CHARS = 400
_MAX_ARRAYS = 12
_ARRAYS = re.compile(r"\]\s*,\s*\[")
_SPACES = re.compile(r"\s{17}")
# Types whose values the checker searches for an expression, whatever stands around it.
_COLLECTIONS = ("Array", "ArrayList", "HashMap", "array", "dict")
_BEGINS = re.compile(r"\bnew\b|^\s*[\[{]")
_WHOLE = re.compile(r"\s*(new\b|[\[{]).*[)}\]]\s*", re.DOTALL)


def mistake(board: Leaderboard, case: Case, calls: Sequence[ToolCall], text: str = "") -> str | None:
    """The reason why calls do not answer a case, in one line; None if they do.

    Without relevance to the tools (`irrelevance`) any call is wrong, of a declared tool or of another; `relevance` asks
    only for one of a declared tool.
    Else the leaderboard's checker compares names, arguments, types and values. Where it takes every
    argument as optional, `{}` is right; where the declaration requires an argument, a call without it is wrong.

    Args:
        board: the checker.
        case: the question.
        calls: those of the answer, in order.
        text: the rest of the answer.
    """
    if case.category.endswith("irrelevance"):
        if CALLS_OPEN in text:
            return "a tool that is not declared is called, and no tool fits the question"
        return f"{calls[0].name} is called, and no tool fits the question" if calls else None
    if not calls:
        return "the answer calls no tool"
    if case.category.endswith("relevance"):
        return None
    wrong = _left_out(case, calls) or _malformed(case, calls)
    return wrong or board.mistake(case, [{call.name: call.arguments} for call in calls])


def _left_out(case: Case, calls: Sequence[ToolCall]) -> str | None:
    """A required argument that a call leaves out."""
    required = {each["name"]: each["parameters"].get("required", []) for each in case.functions}
    for call in calls:
        for name in required.get(call.name, []):
            if name not in call.arguments:
                given = "has no arguments" if not call.arguments else "leaves out an argument"
                return f"the call of {call.name} {given}, and {name!r} is required"
    return None


def _malformed(case: Case, calls: Sequence[ToolCall]) -> str | None:
    """A value in Java or JavaScript that the checker cannot read in reasonable time, or reads a part of."""
    if case.category not in LANGUAGES:
        return None
    types = {each["name"]: each["parameters"]["properties"] for each in case.functions}
    for call in calls:
        for name, value in call.arguments.items():
            if not isinstance(value, str):
                continue
            if len(value) > _MAX_CHARS or len(_ARRAYS.findall(value)) > _MAX_ARRAYS or _SPACES.search(value):
                return f"the value of {name!r} of {call.name} is longer than any right one"
            collection = types.get(call.name, {}).get(name, {}).get("type") in _COLLECTIONS
            if collection and _BEGINS.search(value) and not _WHOLE.fullmatch(value):
                return f"the value of {name!r} of {call.name} has text around a collection"
    return None

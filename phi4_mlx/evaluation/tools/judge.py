"""Right or wrong: the calls in an answer to a question of the leaderboard."""

from __future__ import annotations

import re
from collections.abc import Sequence

from phi4_mlx.evaluation.tools.leaderboard import LANGUAGES, Case, Leaderboard
from phi4_mlx.tools.calls import ToolCall

# Limits of a value in Java or JavaScript. The checker's patterns take exponential time in the arrays and cubic time in
# the length of one that does not match; the longest right value has 5 arrays and 172 characters.
_MAX_ARRAYS = 12
_MAX_CHARS = 1000
_BETWEEN_ARRAYS = re.compile(r"\]\s*,\s*\[")


def mistake(board: Leaderboard, case: Case, calls: Sequence[ToolCall]) -> str | None:
    """The reason why calls do not answer a case, in one line; None if they do.

    Without relevance to the tools (`irrelevance`) any call of a declared tool is wrong; `relevance` asks only for one.
    Else the leaderboard's checker compares names, arguments, types and values. It reads no argument where every one may
    be left out, so `{}` is right there; where the declaration requires an argument, a call without it is wrong.

    Args:
        board: the checker.
        case: the question.
        calls: those of the answer, in order.
    """
    if case.category.endswith("irrelevance"):
        return f"{calls[0].name} is called, and no tool fits the question" if calls else None
    if not calls:
        return "the answer calls no tool"
    if case.category.endswith("relevance"):
        return None
    wrong = _left_out(case, calls) or _unreadable(case, calls)
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


def _unreadable(case: Case, calls: Sequence[ToolCall]) -> str | None:
    """A value that the checker cannot compare in reasonable time."""
    if case.category in LANGUAGES:
        for call in calls:
            for name, value in call.arguments.items():
                if isinstance(value, str) and (
                    len(value) > _MAX_CHARS or len(_BETWEEN_ARRAYS.findall(value)) >= _MAX_ARRAYS
                ):
                    return f"the value of {name!r} of {call.name} is longer than any right one"
    return None

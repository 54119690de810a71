"""Questions that a model answers in its own words, many at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.subject import Progress, Subject
from phi4_mlx.tools.calls import ToolCall


@dataclass(frozen=True)
class Question:
    """A question and the settings of its answer.

    Attributes:
        name: an id for messages; the answer does not depend on it.
        prompt: messages, as for the chat template; or text, in which control strings are control tokens.
        tools: declared to the model, with messages only; their calls are parsed.
        max_tokens: the most tokens to draw.
        stops: strings that end the answer before them, matched while it is drawn, after the thoughts.
        temp: temperature; 0 takes the likeliest token.
        top_p: probability mass to keep.
        seed: of the draws.
    """

    name: str
    prompt: str | Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    max_tokens: int = 512
    stops: tuple[str, ...] = ()
    temp: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: as drawn, up to the stop string or the end marker.
        content: without reasoning, and without the calls of declared tools.
        reasoning: the thoughts.
        calls: of declared tools.
        finish_reason: "stop" or "length".
        tokens: drawn.
        prompt_tokens: of the prompt.
    """

    text: str
    content: str
    reasoning: str
    calls: tuple[ToolCall, ...]
    finish_reason: str
    tokens: int
    prompt_tokens: int


def ask(
    subject: Subject, questions: Sequence[Question], answers: Answers, progress: Progress | None = None
) -> list[Answer]:
    """Has questions answered.

    Args:
        subject: the model.
        questions: in any order.
        answers: each answer is written as soon as it is complete, and those found there are not asked again.
        progress: called with (done, in all).

    Returns:
        The answers, in order.

    Raises:
        RequestError: a question is malformed.
    """
    raise NotImplementedError

"""Checks before a task on tools asks its first question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.options import Options
from phi4_mlx.evaluation.subject import Subject

Document = TypeVar("Document")


def check_tool_format(subject: Subject) -> None:
    """Refuses a model whose chat format cannot declare tools.

    Raises:
        RequestError: it cannot.
    """
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    try:
        subject.tokenizer.apply_chat_template([{"role": "user", "content": ""}], tools=[tool])
    except RequestError as error:
        raise RequestError(f"{subject.name} cannot be evaluated on tools: {error}") from None


def picked(task: str, documents: Sequence[Document], options: Options) -> list[Document]:
    """The documents at the indices that `options.samples` has for the task, or all of them.

    Raises:
        RequestError: an index is not one of a document.
    """
    if task not in options.samples:
        return list(documents)
    for index in options.samples[task]:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(documents):
            raise RequestError(f"{task} has no document {index!r:.100}; they are numbered 0 to {len(documents) - 1:,}")
    return [documents[index] for index in options.samples[task]]

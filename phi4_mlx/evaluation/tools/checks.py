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
    """The documents at the indices that `options.samples` has for the task, or the first `options.limit`.

    Raises:
        RequestError: an index is not one of a document, or no document is left.
    """
    indices = options.samples.get(task, range(len(documents))[: options.limit])
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(documents):
            raise RequestError(f"{task} has no document {index!r:.100}; they are numbered 0 to {len(documents) - 1:,}")
    if not indices:
        raise RequestError(f"{task} is asked no document; raise --limit, or name some with --samples")
    return [documents[index] for index in indices]

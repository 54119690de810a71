"""A check before a task on tools asks its first question."""

from __future__ import annotations

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.subject import Subject


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

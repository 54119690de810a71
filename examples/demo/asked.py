"""A question about a medium of the world of `demo-multimodal`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question, and its one right answer.

    Attributes:
        category: the kind of question, for the table of results.
        text: as a user types it.
        answer: as the model must give it.
    """

    category: str
    text: str
    answer: str

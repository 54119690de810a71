"""The options of an evaluation, as every task gets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from phi4_mlx.errors import RequestError

Progress = Callable[[int, int], None]
"""Called with (done, total), in whatever the task counts: documents, questions, or tokens."""

Document = TypeVar("Document")


@dataclass(frozen=True)
class Options:
    """The options of an evaluation. None stands for the task's own value.

    Attributes:
        limit: documents a task, from its beginning; None for all.
        samples: task -> the ids of the documents to ask, in place of `limit`.
        seed: for the choice of examples (few-shot) and for sampling.
        num_shots: solved examples before each question.
        apply_chat_template: True to ask in the model's chat format, False for plain text.
        max_tokens: longest answer, in tokens.
        temp: temperature of answers; 0 takes the likeliest token.
        top_p: share of the probability that is kept when sampling.
        repeats: answers drawn for each question, with seeds that differ.
        include_path: a folder of own lm-eval tasks in YAML.
        data: a file or folder of data, in place of the task's own.
        lengths: prompt lengths of the long-context task, in tokens.
        depths: depths of the long-context task, in per cent.
        languages: language codes; empty for all that the task has.
        categories: kinds of question; empty for all that the task has.
        confirm_run_unsafe_code: True to let a task run code that the model wrote.
        judge: a local model that judges answers which have no right one.
        folder: the folder for pictures and exports; None writes none.
        progress: called while a task runs.
    """

    limit: int | None = None
    samples: Mapping[str, Sequence[int]] = field(default_factory=dict)
    seed: int = 0
    num_shots: int | None = None
    apply_chat_template: bool | None = None
    max_tokens: int | None = None
    temp: float | None = None
    top_p: float | None = None
    repeats: int | None = None
    include_path: Path | None = None
    data: Path | None = None
    lengths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    languages: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    confirm_run_unsafe_code: bool = False
    judge: str | None = None
    folder: Path | None = None
    progress: Progress | None = None


def picked(task: str, documents: Sequence[Document], options: Options) -> list[Document]:
    """The documents of one of the package's own tasks that are asked.

    Args:
        task: its name.
        documents: all of them.
        options: `samples` has indices for the task, each of which counts once; else the first `limit` are asked.

    Raises:
        RequestError: an index is not one of a document, or no document is left.
    """
    indices = dict.fromkeys(options.samples.get(task, range(len(documents))[: options.limit]))
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(documents):
            raise RequestError(f"{task} has no document {index!r:.100}; they are numbered 0 to {len(documents) - 1:,}")
    if not indices:
        raise RequestError(f"{task} is asked no document; raise --limit, or name some with --samples")
    return [documents[index] for index in indices]

"""Work shared out among the processes of `mx.distributed`, each with the whole model and a disk of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from phi4_mlx.errors import RequestError, message_of
from phi4_mlx.evaluation.answers import Answers


def join_group() -> mx.distributed.Group | None:
    """The processes that this one was started with; None for this one alone."""
    group = mx.distributed.init()
    return group if group.size() > 1 else None


def answers_path(folder: Path, task: str, group: mx.distributed.Group | None) -> Path:
    """The file of a task's answers; each process has its own, as several may share a disk."""
    rank = 0 if group is None else group.rank()
    return folder / (f"{task}-{rank}.jsonl" if rank else f"{task}.jsonl")


def other_answers(own: Path, task: str) -> list[Path]:
    """The files of a task's answers beside a process's own, as of a run by more processes than now."""
    name = re.compile(rf"{re.escape(task)}(-\d+)?\.jsonl")
    return sorted(path for path in own.parent.glob("*.jsonl") if name.fullmatch(path.name) and path != own)


def share_out(
    group: mx.distributed.Group | None,
    sizes: Mapping[str, int],
    answers: Answers,
    run: Callable[[Sequence[str]], object],
) -> dict[str, Any]:
    """Has questions answered, each by one process, and gathers the answers in all of them.

    Args:
        group: the processes; None for this one alone.
        sizes: the key of each question -> its size; neighbours stay in one process where possible.
        answers: of this process. What another process has on its disk is not asked again.
        run: called with the keys for this process to answer; those that have an answer already are among them only
            where there is one process.

    Returns:
        The answer to each question, the same in every process.

    Raises:
        RequestError: another process has failed, or has other questions.
    """
    if group is None:
        run(list(sizes))
        return {key: answers.get(key) for key in sizes}
    found = _gathered(group, sizes, answers)
    missing = {key: size for key, size in sizes.items() if key not in found}
    try:
        run(_dealt(missing, group.rank(), group.size()))
    except Exception as error:
        with contextlib.suppress(RequestError):  # which says what this process says below
            _gathered(group, missing, answers, message_of(error))  # else the others would wait for ever
        raise
    return found | _gathered(group, missing, answers)


def _gathered(group: mx.distributed.Group, keys: Iterable[str], answers: Answers, failure: str = "") -> dict[str, Any]:
    """The answers that any process has.

    Raises:
        RequestError: a process has failed, or has other questions.
    """
    keys = list(keys)
    own = [[n, value] for n, key in enumerate(keys) if (value := answers.get(key)) is not None]
    questions = hashlib.sha256("".join(keys).encode()).hexdigest()
    everyones = [json.loads(data) for data in _all_bytes(group, json.dumps([questions, failure, own]).encode())]
    for rank, (other, message, _) in enumerate(everyones):
        if message:
            raise RequestError(f"process {rank} of {group.size()} has failed: {message}")
        if other != questions:
            raise RequestError(
                f"process {rank} of {group.size()} has other questions than process {group.rank()}; start all with "
                "the same model, tasks and options"
            )
    by_number = {n: value for _, _, some in everyones for n, value in some}
    return {key: by_number[n] for n, key in enumerate(keys) if n in by_number}


def _dealt(sizes: Mapping[str, int], rank: int, ranks: int) -> list[str]:
    """The keys for one process: stretches of about equal size, in order."""
    total, before, own = sum(sizes.values()), 0, []
    for key, size in sizes.items():
        if ranks * before // max(total, 1) == rank:
            own.append(key)
        before += size
    return own


def _all_bytes(group: mx.distributed.Group, data: bytes) -> list[bytes]:
    """The bytes of every process, in the order of their ranks."""
    lengths: list[int] = mx.distributed.all_gather(mx.array([len(data)]), group=group, stream=mx.cpu).tolist()
    padded = mx.array(memoryview(data.ljust(max(lengths), b"\0")), mx.uint8)[None]
    gathered = mx.distributed.all_gather(padded, group=group, stream=mx.cpu)
    return [bytes(memoryview(row))[:length] for row, length in zip(gathered, lengths, strict=True)]

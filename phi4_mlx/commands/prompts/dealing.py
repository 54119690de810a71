"""Requests dealt to several ranks, each with the whole model: small portions, so that no rank waits for another.

A follower sends a message and reads the leader's reply before it sends the next one; the leader sends replies alone. So
never do both wait for the other to read. Nothing else crosses while answers are drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from phi4_mlx.commands.prompts.requests import from_json, to_json
from phi4_mlx.errors import Phi4Error, RequestError
from phi4_mlx.generation.answer_batch import Answer, AnswerBatch, AnswerRequest
from phi4_mlx.grammar.grammars import Grammar

if TYPE_CHECKING:
    from phi4_mlx.ranks.join import Ranks

PORTION = 16  # requests; a rank asks for more when it has half of them left

Take = Callable[[AnswerRequest, "Answer | Exception"], None]


class Exchange(Protocol):
    """Plain values between the ranks, such as `phi4_mlx.ranks.join.Ranks`."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    def ready(self, timeout_s: float | None = 0) -> Sequence[int]:
        """The ranks whose next message can be read without waiting."""

    def answer_of(self, rank: int) -> Any:
        """The next value that a follower has sent by `answer`; of the leader."""

    def tell(self, command: Mapping[str, Any], *, rank: int | None = None) -> None:
        """Sends a command to one follower, or all; of the leader."""

    def hear(self) -> Mapping[str, Any]:
        """The next command; of a follower. Exits the process at the end of the job."""

    def answer(self, value: Any) -> None:
        """Sends a value to the leader; of a follower."""


def meet(ranks: Ranks, limit_bytes: int, grammar: Grammar | None) -> int:
    """Waits until the followers have loaded the model; of the leader.

    Args:
        ranks: all ranks.
        limit_bytes: usable bytes of the leader's machine.
        grammar: of all requests.

    Returns:
        The usable bytes of the smallest machine.
    """
    ranks.tell({"grammar": None if grammar is None else grammar.text})
    limits: list[int] = ranks.answers()
    return min(limit_bytes, *limits)


def greet(ranks: Ranks, limit_bytes: int) -> Grammar | None:
    """Tells the leader that a follower has loaded the model; returns the grammar of all requests."""
    ranks.answer(limit_bytes)
    text = ranks.hear()["grammar"]
    return None if text is None else Grammar(text)


def lead(ranks: Exchange | None, batch: AnswerBatch, requests: Sequence[AnswerRequest], take: Take) -> None:
    """Deals requests to all ranks, this one among them, until each has its answer.

    Args:
        ranks: the exchange with the followers; None for a process on its own.
        batch: of this rank.
        requests: in the order in which they start.
        take: called with each request and its answer.

    Raises:
        RequestError: a follower could not answer a request.
    """
    queue, own = deque(requests), deque[AnswerRequest]()
    away: dict[str, AnswerRequest] = {}

    def portion() -> list[AnswerRequest]:
        count = len(queue) if ranks is None else min(PORTION, -(-len(queue) // (2 * ranks.size)))
        return [queue.popleft() for _ in range(count)]

    def reply(ranks: Exchange, rank: int) -> None:
        said = ranks.answer_of(rank)
        dealt = portion() if said["asks"] else []
        away.update({request.key: request for request in dealt})
        ranks.tell({"requests": [to_json(request) for request in dealt], "more": bool(queue)}, rank=rank)
        for key, answer in said["answers"]:
            take(away.pop(key), RequestError(answer) if isinstance(answer, str) else Answer.from_json(answer))

    while queue or own or batch or away:
        if len(own) < PORTION // 2:
            own.extend(portion())
        if ranks is not None:
            for rank in ranks.ready(0 if own or batch else None):
                reply(ranks, rank)
        batch.fill(own)
        for request, answer in batch.step() if batch else ():
            take(request, answer)


def follow(ranks: Exchange, batch: AnswerBatch, grammar: Grammar | None) -> NoReturn:
    """Answers what the leader deals, until it ends the job.

    Args:
        ranks: the exchange with the leader.
        batch: of this rank.
        grammar: of all requests.
    """
    own = deque[AnswerRequest]()
    finished: list[tuple[str, Any]] = []
    awaits, more = False, True
    while True:
        asks = more and len(own) < PORTION // 2
        if not awaits and (asks or finished):
            ranks.answer({"asks": asks, "answers": finished})
            awaits, finished = True, []
        while ranks.ready() or not (own or batch):
            said = ranks.hear()
            own.extend(from_json(each, grammar) for each in said["requests"])
            awaits, more = False, said["more"]
            if finished or more:
                break
        batch.fill(own)
        for request, answer in batch.step() if batch else ():
            if isinstance(answer, Exception) and not isinstance(answer, Phi4Error):
                raise answer
            finished.append((request.key, str(answer) if isinstance(answer, Exception) else answer.to_json()))

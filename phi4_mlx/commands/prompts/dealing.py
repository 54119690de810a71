"""Requests dealt to several ranks, each with the whole model: small portions, so that no rank waits for another.

A follower sends a message and reads the leader's reply before it sends the next one; the leader sends replies alone. So
never do both wait for the other to read. Nothing else crosses while answers are drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from phi4_mlx.commands.prompts.requests import from_json, to_json
from phi4_mlx.errors import Phi4Error, RequestError
from phi4_mlx.generation.answer_batch import Answer, AnswerBatch, AnswerRequest

if TYPE_CHECKING:
    from phi4_mlx.grammar.grammars import Grammar

PORTION = 16  # requests; a rank asks for more when it has half of them left

Take = Callable[[AnswerRequest, "Answer | Exception"], None]


class Exchange(Protocol):
    """Plain values between the ranks, such as `phi4_mlx.ranks.join.Ranks`."""

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


def lead(ranks: Exchange, size: int, batch: AnswerBatch, requests: Sequence[AnswerRequest], take: Take) -> None:
    """Deals requests to all ranks, this one among them, until each has its answer.

    Args:
        ranks: the exchange with the followers.
        size: the number of ranks.
        batch: of this rank.
        requests: in the order in which they start.
        take: called with each request and its answer.

    Raises:
        RequestError: a follower could not answer a request.
    """
    queue, own = deque(requests), deque[AnswerRequest]()
    away: dict[str, AnswerRequest] = {}

    def portion() -> list[AnswerRequest]:
        count = min(PORTION, -(-len(queue) // (2 * size)))
        return [queue.popleft() for _ in range(count)]

    while queue or own or batch or away:
        if len(own) < PORTION // 2:
            own.extend(portion())
        for rank in ranks.ready(0 if own or batch else None):
            said = ranks.answer_of(rank)
            dealt = portion() if said["asks"] else []
            away |= {request.key: request for request in dealt}
            ranks.tell({"requests": [to_json(request) for request in dealt], "more": bool(queue)}, rank=rank)
            for key, answer in said["answers"]:
                take(away.pop(key), RequestError(answer) if isinstance(answer, str) else Answer.from_json(answer))
        batch.fill(own)
        for request, answer in batch.step() if batch else ():
            take(request, answer)


def follow(ranks: Exchange, batch: AnswerBatch, grammar: Grammar | None) -> None:
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

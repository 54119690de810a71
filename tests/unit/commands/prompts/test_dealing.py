"""Requests dealt to ranks: each answered once, whoever is slow, and no rank idle while requests wait."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from queue import Queue
from typing import Any

import pytest

from phi4_mlx.commands.prompts.dealing import PORTION, follow, lead
from phi4_mlx.commands.prompts.requests import from_json, to_json
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.answer_batch import Answer, AnswerRequest
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.grammar.grammars import Grammar


class Closed(Exception):
    """The end of the job, as a follower hears it."""


class Ranks:
    """The exchange of ranks that are threads of one process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._said: list[deque[Any]] = [deque() for _ in range(size)]
        self._commands: list[Queue[Any]] = [Queue() for _ in range(size)]
        self._changed = threading.Condition()

    def of(self, rank: int) -> Follower:
        return Follower(self, rank)

    def ready(self, timeout_s: float | None = 0) -> Sequence[int]:
        def found() -> list[int]:
            return [rank for rank, said in enumerate(self._said) if said]

        with self._changed:
            if timeout_s is None:
                assert self._changed.wait_for(found, 20)
            return found()

    def answer_of(self, rank: int) -> Any:
        return self._said[rank].popleft()

    def tell(self, command: Mapping[str, Any], *, rank: int | None = None) -> None:
        assert rank is not None
        self._commands[rank].put(command)

    def close(self) -> None:
        for commands in self._commands:
            commands.put(None)


class Follower:
    """The same, as a follower sees it; it never sends twice without a reply between."""

    size = 0

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks, self._rank, self._awaits = ranks, rank, False

    def ready(self, timeout_s: float | None = 0) -> Sequence[int]:
        return [] if self._ranks._commands[self._rank].empty() else [0]

    def hear(self) -> Any:
        command = self._ranks._commands[self._rank].get(timeout=20)
        if command is None:
            raise Closed
        self._awaits = False
        return command

    def answer(self, value: Any) -> None:
        assert not self._awaits
        self._awaits = True
        with self._ranks._changed:
            self._ranks._said[self._rank].append(value)
            self._ranks._changed.notify()


class Batch:
    """Answers each request after as many steps as it has tokens, `rows` at a time."""

    def __init__(self, rows: int = 4, pause: threading.Event | None = None, failing: str = "") -> None:
        self.rows, self.pause, self.failing = rows, pause, failing
        self.running: dict[AnswerRequest, int] = {}
        self.taken: list[str] = []

    def __len__(self) -> int:
        return len(self.running)

    def fill(self, queue: deque[AnswerRequest]) -> None:
        while queue and len(self.running) < self.rows:
            request = queue.popleft()
            self.running[request] = request.max_tokens
            self.taken.append(request.key)

    def step(self) -> list[tuple[AnswerRequest, Answer | Exception]]:
        if self.pause is not None:
            assert self.pause.wait(20)
        self.running = {request: left - 1 for request, left in self.running.items()}
        ended = [request for request, left in self.running.items() if not left]
        for request in ended:
            del self.running[request]
        return [(each, RequestError("no") if each.key == self.failing else finished(each)) for each in ended]


def finished(request: AnswerRequest) -> Answer:
    return Answer(f"text {request.key}", "", "", (), "stop", request.max_tokens, len(request.ids))


def requests(count: int) -> list[AnswerRequest]:
    return [AnswerRequest(str(n), [n + 1], 1 + n * 7 % 13) for n in range(count)]


def run(
    size: int, wanted: list[AnswerRequest], batches: Sequence[Any], seen: Callable[[int], object] = lambda count: None
) -> list[tuple[str, Answer | Exception]]:
    """The answers in the order in which the leader took them; rank 0's batch is the first.

    `seen` is called with their number.
    """
    ranks = Ranks(size)
    taken: list[tuple[str, Answer | Exception]] = []

    def following(rank: int) -> None:
        with pytest.raises(Closed):
            follow(ranks.of(rank), batches[rank], None)

    def take(request: AnswerRequest, answer: Answer | Exception) -> None:
        taken.append((request.key, answer))
        seen(len(taken))

    threads = [threading.Thread(target=following, args=(rank,), daemon=True) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    lead(ranks, batches[0], wanted, take)
    ranks.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return taken


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_each_request_is_answered_once(size: int, count: int) -> None:
    wanted, batches = requests(count), [Batch() for _ in range(size)]
    taken = run(size, wanted, batches)
    assert sorted(taken, key=lambda each: int(each[0])) == [(each.key, finished(each)) for each in wanted]
    assert sorted(int(key) for batch in batches for key in batch.taken) == [*range(count)]


def test_a_slow_rank_takes_less() -> None:
    """Rank 1 stands still until the others have done all that it has not taken."""
    pause = threading.Event()
    batches = [Batch(), Batch(pause=pause), Batch()]
    most = 3 * PORTION  # what a rank has taken, and what it has asked for besides
    taken = run(3, requests(400), batches, lambda count: count == 400 - most and pause.set())
    assert len({key for key, _ in taken}) == 400 and len(batches[1].taken) <= most


def test_a_request_that_fails_on_a_follower_is_an_error_on_the_leader() -> None:
    wanted = requests(40)
    taken = dict(run(2, wanted, [Batch(rows=1), Batch(failing="39")]))
    failed = [key for key, answer in taken.items() if isinstance(answer, Exception)]
    assert failed in ([], ["39"])  # rank 0 may have taken it
    assert len(taken) == 40


def test_a_process_on_its_own_deals_to_itself() -> None:
    batch, taken = Batch(), []
    lead(None, batch, requests(20), lambda request, answer: taken.append(request.key))  # type: ignore[arg-type]
    assert sorted(taken) == sorted(batch.taken) and len({*taken}) == 20


def test_a_request_crosses_as_plain_values() -> None:
    grammar = Grammar("start: /a/")
    request = AnswerRequest("3", [1, 2, 300_000], 7, Sampling(0.5, seed=4), ("x",), [{"name": "t"}], grammar, True)
    back = from_json(json.loads(json.dumps(to_json(request))), grammar)
    assert [*back.ids] == [1, 2, 300_000]
    assert (back.key, back.max_tokens, back.sampling, [*back.stops]) == ("3", 7, Sampling(0.5, seed=4), ["x"])
    assert (back.tools, back.grammar, back.thinks) == ([{"name": "t"}], grammar, True)

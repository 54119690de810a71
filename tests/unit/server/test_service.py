"""The service between an API and the engine: pieces and finishes in, deltas and ends out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from phi4_mlx.grammar.apart import Refused
from phi4_mlx.grammar.grammars import Grammar
from phi4_mlx.grammar.order import Order
from phi4_mlx.server.apis.wire import Ask, Delta, End, WireError
from phi4_mlx.server.engine.protocol import Failure, Finish, Job, Piece, TokenLogprob
from phi4_mlx.server.engine.supervisor import Full
from phi4_mlx.server.grammar_pool import Busy
from phi4_mlx.server.service import Service

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = '<|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|/tool_call|>'


class Engine:
    """Stands in for the supervisor: gives every job the same events, or raises."""

    def __init__(self, *events: Any) -> None:
        self._events = events

    async def events(self, job: Job) -> AsyncGenerator[Any, None]:
        for event in self._events:
            if isinstance(event, Exception):
                raise event
            yield event


def pieces(*texts: str, reason: Any = "stop") -> list[Any]:
    return [*(Piece(0, text) for text in texts), Finish(0, reason, None, 7, 5, 3)]


def answers(ask: Ask, *events: Any, jobs: int = 1, thinks: bool = False) -> list[Any]:
    service = Service(Engine(*events), None, {}, 0, 60.0, thinks=thinks)  # type: ignore[arg-type]

    async def collect() -> list[Any]:
        return [item async for item in service.answers(ask, [Job(0, (1,), 9)] * jobs)]

    return asyncio.run(collect())


def calling(**fields: Any) -> Ask:
    return Ask("m", tools=[TOOL], tool_choice="auto", **fields)


def test_text_comes_piece_by_piece_and_then_the_end() -> None:
    logprobs = (TokenLogprob(b"b", -1.0),)
    events = [Piece(0, "a"), Piece(0, "", logprobs), Piece(0, ""), *pieces("c", reason="length")]
    assert answers(Ask("m"), *events) == [
        Delta(0, "a"), Delta(0, "", None, logprobs), Delta(0, "c"), End(0, "length", None, 7, 5, 3),
    ]  # fmt: skip


def test_calls_are_taken_out_of_the_text() -> None:
    before, call, end = answers(calling(), *pieces("so ", CALL[:20], CALL[20:]))
    assert before == Delta(0, "so ") and end == End(0, "tool_calls", None, 7, 5, 3)
    assert (call.text, call.call.name, call.call.arguments) == ("", "add", {"a": 1})
    assert answers(calling(), *pieces(CALL, reason="timeout"))[-1].reason == "timeout"
    cut = answers(calling(), *pieces(CALL[:20], reason="length"))
    assert cut == [Delta(0, CALL[:20]), End(0, "length", None, 7, 5, 3)]  # kept back until the end


@pytest.mark.parametrize("reason", ["length", "timeout"])
def test_a_call_that_is_cut_or_forced_is_text(reason: Any) -> None:
    for end in range(1, len(CALL)):
        *_, last = told = answers(calling(), *pieces(CALL[:end], reason=reason))
        complete = "]" in CALL[:end]  # only the closing tag is missing
        assert last.reason == reason and any(isinstance(it, Delta) and it.call for it in told) == complete
        forced = [Piece(0, CALL[:end]), Piece(0, CALL[end:], (), True), Finish(0, "length", None, 7, 5, 3)]
        *deltas, last = answers(calling(), *forced)
        assert last.reason == "length" and any(it.call is not None for it in deltas) == complete
        assert complete or "".join(it.text for it in deltas) == CALL
    stopped = [Piece(0, CALL[:30]), Finish(0, "stop", "arguments", 7, 5, 3)]
    assert answers(calling(), *stopped) == [Delta(0, CALL[:30]), End(0, "stop", "arguments", 7, 5, 3)]


def test_calls_are_text_where_none_are_wanted() -> None:
    for ask in (Ask("m", tools=[TOOL]), Ask("m")):
        assert answers(ask, *pieces(CALL)) == [Delta(0, CALL), End(0, "stop", None, 7, 5, 3)]
    bare = '{"name": "add", "arguments": {}}'
    assert answers(calling(), *pieces(bare))[0].call.name == "add"
    assert answers(calling(response_format=("json_object",)), *pieces(bare))[0] == Delta(0, bare)


def test_several_answers_keep_their_index() -> None:
    items = answers(Ask("m", n=2), *pieces("a"), jobs=2)
    assert sorted(item.index for item in items if isinstance(item, End)) == [0, 1]
    assert sorted(item.index for item in items if isinstance(item, Delta)) == [0, 1]


@pytest.mark.parametrize(
    ("event", "status"), [(Failure(0, 503, "stopped"), 503), (Full(), 429), (RuntimeError("bug"), 500)]
)
def test_a_failure_is_an_error_with_a_status(event: Any, status: int) -> None:
    with pytest.raises(WireError) as raised:
        answers(Ask("m"), Piece(0, "a"), event)
    assert raised.value.status == status


class Grammars:
    """Stands in for the pool: gives every order the same result."""

    def __init__(self, result: Grammar | Exception) -> None:
        self._result = result
        self.orders: list[Order] = []

    async def make(self, order: Order) -> Grammar:
        self.orders.append(order)
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


def grammar(ask: Ask, result: Grammar | Exception) -> tuple[Any, list[Order]]:
    pool = Grammars(result)
    service = Service(Engine(), None, {}, 0, 60.0, grammars=pool)  # type: ignore[arg-type]
    return asyncio.run(service.grammar(ask)), pool.orders


def test_a_grammar_comes_with_what_it_does_not_enforce() -> None:
    made = Grammar("text", ("tool 'add': not",))
    assert grammar(calling(), made)[0] == ("text", ("tool 'add': not",))
    _, orders = grammar(calling(response_format=("json_schema", {}), strict=True, parallel_tool_calls=False), made)
    assert orders == [Order(("json_schema", {}), True, (TOOL,), "auto", False)]
    for free in (Ask("m"), Ask("m", tools=[TOOL])):
        assert grammar(free, made) == ((None, ()), [])


@pytest.mark.parametrize(
    ("error", "status", "field"), [(Refused("no", "tools"), 400, "tools"), (Busy(), 503, None), (OSError(), 503, None)]
)
def test_a_grammar_that_is_not_made_is_an_error_with_a_status(error: Exception, status: int, field: Any) -> None:
    with pytest.raises(WireError) as raised:
        grammar(calling(), error)
    assert (raised.value.status, raised.value.param) == (status, field)


def test_thoughts_are_apart_where_the_model_thinks_and_its_answer_is_free() -> None:
    events = pieces("<thi", "nk>Let me ", f"see {CALL}.</think>\n", "It is 4.")
    whole = "".join(event.text for event in events[:-1])
    asked = Ask("m", messages=[{"role": "user", "content": "2 + 2?"}], tools=[TOOL], tool_choice="auto")
    *deltas, end = answers(asked, *events, thinks=True)
    assert "".join(it.thought for it in deltas) == f"Let me see {CALL}." and end.reason == "stop"
    assert "".join(it.text for it in deltas) == "It is 4." and not any(it.call for it in deltas)
    for other in (
        replace(asked, tools=[], response_format=("regex", "x")), replace(asked, messages=[], prompts=["a"], tools=[]),
    ):  # fmt: skip
        assert "".join(it.text for it in answers(other, *events, thinks=True)[:-1]) == whole
    plain = answers(replace(asked, tools=[]), *events)
    assert "".join(it.text for it in plain[:-1]) == whole


def test_thoughts_that_are_cut_are_thoughts() -> None:
    asked = Ask("m", messages=[{"role": "user", "content": "2 + 2?"}])
    *deltas, end = answers(asked, *pieces("<think>a", " b </th", reason="length"), thinks=True)
    assert "".join(it.thought for it in deltas) == "a b </th" and end.reason == "length"
    assert not any(it.text for it in deltas)

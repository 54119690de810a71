"""Shared by the tests of the APIs: values, streams taken apart, and an API served to its official client in memory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.server.apis.answer import Answer
from phi4_mlx.server.apis.wire import Call, Delta, End, WireError, error_body

V = 1_000  # token ids
NOW = 1_700_000_000
HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
KÖLN = Call("call_1", "weather", {"city": "Köln"})
ROM = Call("call_2", "weather", {"city": "Rom"})
TEXT = [Delta(text="Gr"), Delta(), Delta(text="üße"), End(0, "stop", None, 10, 4, 3)]
THOUGHTS = [
    Delta(thought="Let me "), Delta(thought="see."), Delta(text="It is 4."), End(0, "stop", None, 10, 4, 3),
]  # fmt: skip
CALLS = [Delta(text="So"), Delta(text="."), Delta(call=KÖLN), Delta(text="!"), End(0, "tool_calls", None, 10, 4, 5)]


def counted_ids() -> Callable[[str], str]:
    """Makes ids that differ by a number, from 0."""
    count = itertools.count()
    return lambda prefix: f"{prefix}{next(count)}"


def refused(parse: Callable[[], Any]) -> WireError:
    """The error with which a body is refused."""
    with pytest.raises(WireError) as caught:
        parse()
    assert caught.value.status == 400
    return caught.value


def stream(answer: Answer, items: Sequence[Delta | End], error: WireError | None = None) -> bytes:
    """A whole stream; with an error, one that fails after the items."""
    end = answer.opening() + b"".join(map(answer.chunk, items))
    return end + (answer.closing() if error is None else answer.failure(error))


def chunks(data: bytes) -> list[JsonObject]:
    """The chunks of a complete stream without event names."""
    events = [event.removeprefix("data: ") for event in data.decode().split("\n\n")[:-1]]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def named_events(data: bytes) -> list[JsonObject]:
    """The events of a stream in which each has its type as its name."""
    events = []
    for event in data.decode().split("\n\n")[:-1]:
        name, text = event.split("\n")
        events.append(json.loads(text.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def served(
    make_answer: Callable[[JsonObject], Answer],
    items: Sequence[Delta | End],
    error: WireError | None = None,
    make_error: Callable[[WireError], JsonObject] = error_body,
) -> Any:
    """An HTTP client for an official client; every request gets the same answer, without a socket.

    Args:
        make_answer: parses a body and makes its answer.
        items: the answer.
        error: makes a stream fail after the first item.
        make_error: the API's form of an error.
    """
    httpx = pytest.importorskip("httpx2")

    def serve(request: Any) -> Any:
        try:
            answer = make_answer(json.loads(request.content))
        except WireError as refusal:
            return httpx.Response(refusal.status, json=make_error(refusal))
        if not answer.ask.stream:
            return httpx.Response(200, json=answer.body(items))
        data = stream(answer, items) if error is None else stream(answer, items[:1], error)
        return httpx.Response(200, content=answer.heartbeat + data, headers={"content-type": "text/event-stream"})

    return httpx.Client(transport=httpx.MockTransport(serve))


def openai_client(
    make_answer: Callable[[JsonObject], Answer], items: Sequence[Delta | End], error: WireError | None = None
) -> Any:
    """OpenAI's client of `served`."""
    openai = pytest.importorskip("openai")
    http = served(make_answer, items, error)
    return openai.OpenAI(api_key="k", base_url="http://localhost/v1", http_client=http, max_retries=0)

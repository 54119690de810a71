"""A served model whose cache cannot be trimmed: every API, prompts with a known prefix, and clients that leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.server_process import HANG_S, Server
from tests.tiny_sambay import write_tiny_sambay

pytestmark = pytest.mark.slow

SYSTEM = "You are a careful teller of numbers. " * 20
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_tiny_sambay(tmp_path_factory.mktemp("served") / "tiny", max_position_embeddings=65536)
    running = Server("--model", str(folder))
    yield running
    running.stop()


def body(question: str = "Say hello.", system: str = SYSTEM, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0} | more


def answer(response: httpx.Response) -> tuple[str, int, int]:
    """The text of a chat completion, its prompt's tokens, and those of them that were cached."""
    assert response.status_code == 200, response.text
    said, usage = response.json()["choices"][0]["message"]["content"], response.json()["usage"]
    return said, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def wait_until_idle(server: Server) -> None:
    end = time.monotonic() + HANG_S
    while not server.idle():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_every_api_counts_the_tokens_that_were_cached(server: Server) -> None:
    _, length, _ = answer(server.post(CHAT, body()))
    _, _, cached = answer(server.post(CHAT, body()))
    assert cached == length - 1
    anthropic = {"model": "tiny", "system": SYSTEM, "max_tokens": 4, "messages": body()["messages"][1:]}
    usage = server.post(MESSAGES, anthropic).json()["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (1, length - 1)
    question = {"model": "tiny", "instructions": SYSTEM, "input": "Say hello.", "max_output_tokens": 4}
    usage = server.post(RESPONSES, question).json()["usage"]
    assert (usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]) == (length, length - 1)
    _, length, cached = answer(server.post(CHAT, body("What else is there?")))
    assert length - 30 < cached < length - 1  # all of the system prompt


def test_tools_and_schemas_are_obeyed(server: Server) -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "find_city", "parameters": city}}]
    message = server.post(CHAT, body(tools=tools, tool_choice="required", max_tokens=300)).json()["choices"][0]
    assert message["message"]["tool_calls"][0]["function"]["name"] == "find_city"
    key, value = "k" * 60, "v" * 60  # longer than what a cache can take back
    forced = {"type": "object", "properties": {key: {"const": value}}, "required": [key], "additionalProperties": False}
    schema = {"type": "json_schema", "json_schema": {"name": "forced", "schema": forced}}
    said, _, _ = answer(server.post(CHAT, body(response_format=schema, max_tokens=300)))
    assert json.loads(said) == {key: value}


@pytest.mark.parametrize("timeout_s", [0.05, 2.0])  # in the prefill, and mostly in the decode
def test_a_client_that_leaves_does_not_change_later_answers(server: Server, timeout_s: float) -> None:
    expected, _, _ = answer(server.post(CHAT, body("What is left?")))
    long = body("one two three four " * 1500, logit_bias={"2": -100}, max_tokens=20_000)
    with contextlib.suppress(httpx.TimeoutException):
        httpx.post(server.url + CHAT, json=long, timeout=timeout_s)
    wait_until_idle(server)
    assert answer(server.post(CHAT, body("What is left?")))[0] == expected
    assert server.metrics()["kv_bytes"] == 0


def test_a_new_engine_answers_as_the_one_that_died(server: Server) -> None:
    expected, _, _ = answer(server.post(CHAT, body("Who is there?")))
    os.kill(server.engine, signal.SIGKILL)
    said, _, cached = answer(server.post(CHAT, body("Who is there?")))
    assert (said, cached) == (expected, 0)


def test_a_prompt_past_the_context_is_refused_in_a_line(server: Server) -> None:
    error = server.post(CHAT, body("a b c d " * 20_000)).json()["error"]
    assert "65536" in error["message"] and "\n" not in error["message"]

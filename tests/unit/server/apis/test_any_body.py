"""Random bodies, 5,000 to each API: each becomes a valid `Ask` or is refused with status 400."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from phi4_mlx.generation.sampling import make_logits_processors, make_sampler
from phi4_mlx.server.apis import chat as chat_api
from phi4_mlx.server.apis import completions as completions_api
from phi4_mlx.server.apis import messages as messages_api
from phi4_mlx.server.apis import responses as responses_api
from phi4_mlx.server.apis.wire import Ask, WireError
from phi4_mlx.tokens.messages import check_messages
from phi4_mlx.tools.declarations import check_tools, tools_text
from tests.unit.server.apis.harness import SCHEMA, V

JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**64, 10**400, 0.5, -0.5, 1e308, math.nan, math.inf, "", "x", "auto",
    "\x00", "\ud800", "a\udfff", "<|end|>", "../..", "x" * 70_000, [], [None], [[]], [{}], [1, "a"], ["a"], [1, 2],
    [True], {}, {"type": "text"}, {"type": None}, {"type": []}, {"type": "function"}, {"a": {"b": []}}, {"": None},
]  # fmt: skip
TEXTS: list[Any] = ["hi", "", "é😀", "\x00", [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]]
FUNCTION = {"name": "weather", "description": "Tells", "parameters": SCHEMA}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}

SHARED: dict[str, list[Any]] = {
    "temperature": [0, 0.7, 2],
    "top_p": [0.5, 1],
    "top_k": [-1, 0, 40],
    "min_p": [0.1],
    "seed": [0, -5, 2**63],
    "presence_penalty": [-2, 0, 1.5],
    "frequency_penalty": [0.5],
    "repetition_penalty": [1.1],
    "logit_bias": [{}, {"5": 1, "999": -100}, {"1000": 1}],
    "stop": ["x", ["a", "b"]],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}, {}],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": SCHEMA}}],
    "max_tokens": [1, 100, None],
    "n": [1, 3, 8, 9],
    "user": ["me"],
    "metadata": [{"a": "b"}],
    "unknown_field": [5],
}
CHAT: dict[str, list[Any]] = {
    **SHARED,
    "max_completion_tokens": [5],
    "logprobs": [True, False],
    "top_logprobs": [0, 5, 20],
    "tools": [[{"type": "function", "function": FUNCTION}], [{"type": "web_search"}], []],
    "tool_choice": ["auto", "none", "required", {"type": "function", "function": {"name": "weather"}}],
    "parallel_tool_calls": [True, False],
    "modalities": [["text"], ["text", "audio"]],
    "functions": [[FUNCTION]],
    "audio": [{"voice": "x"}],
}
COMPLETIONS: dict[str, list[Any]] = {
    **SHARED,
    "best_of": [1, 2],
    "echo": [True, False],
    "logprobs": [0, 5],
    "suffix": ["x"],
}
RESPONSES: dict[str, list[Any]] = {
    **SHARED,
    "instructions": ["be kind"],
    "tools": [[{"type": "function", **FUNCTION}], [{"type": "web_search"}]],
    "tool_choice": ["auto", "required", {"type": "function", "name": "weather"}],
    "text": [{"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}, {"verbosity": "low"}],
    "max_output_tokens": [5],
    "include": [["message.output_text.logprobs"], ["reasoning.encrypted_content"]],
    "top_logprobs": [3],
    "previous_response_id": ["resp_1"],
    "truncation": ["auto", "disabled"],
    "background": [True, False],
}
MESSAGES: dict[str, list[Any]] = {
    **SHARED,
    "max_tokens": [1, 100],
    "system": TEXTS,
    "stop_sequences": [["a"]],
    "tools": [[{"name": "weather", "input_schema": SCHEMA}], [{"type": "bash_20250124", "name": "bash"}]],
    "tool_choice": [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "weather"}, {"type": "none"}],
    "thinking": [{"type": "disabled"}, {"type": "enabled", "budget_tokens": 5}],
    "output_config": [{"format": {"type": "json_schema", "schema": SCHEMA}}],
}


def chat_message(draw: random.Random) -> Any:
    role = draw.choice(["system", "developer", "user", "assistant", "tool"] * 4 + ["function"])
    message: dict[str, Any] = {"role": role, "content": draw.choice([*TEXTS, *TEXTS, None, [IMAGE]])}
    if draw.random() < (0.5 if role == "assistant" else 0.05):
        message["tool_calls"] = [CALL] * draw.randint(0, 2)
    if role == "tool":
        message["tool_call_id"] = draw.choice(["1", "2"])
    return message


def input_item(draw: random.Random) -> Any:
    call = {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "1", "output": draw.choice(TEXTS)}
    message = {"role": draw.choice(["user", "assistant", "developer", "tool"]), "content": draw.choice(TEXTS)}
    return draw.choice([call, result, message, {**message, "type": "message"}, {"type": "item_reference", "id": "x"}])


def anthropic_message(draw: random.Random) -> Any:
    blocks = [
        {"type": "text", "text": "a"},
        {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Köln"}},
        {"type": "tool_result", "tool_use_id": "1", "content": draw.choice(TEXTS), "is_error": draw.random() < 0.5},
        {"type": "image", "source": {}},
        {"type": "thinking", "thinking": "hm", "signature": ""},
    ]
    content = draw.choice(["hi", draw.sample([blocks[0], blocks[2]], draw.randint(0, 2)), draw.sample(blocks, 2)])
    return {"role": draw.choice(["user"] * 4 + ["assistant", "system"]), "content": content}


APIS: list[tuple[ModuleType, dict[str, list[Any]], str, Callable[[random.Random], Any]]] = [
    (chat_api, CHAT, "messages", chat_message),
    (completions_api, COMPLETIONS, "prompt", lambda draw: draw.choice(["a", "b", "c", [1, 2], [1000]])),
    (responses_api, RESPONSES, "input", input_item),
    (messages_api, MESSAGES, "messages", anthropic_message),
]


def spoil(draw: random.Random, value: Any) -> Any:
    """The value with one element, at any depth, replaced by junk."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(list(value))
        if draw.random() < 0.2:
            return {key: it for key, it in value.items() if key != name}
        return {**value, name: spoil(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], spoil(draw, value[at]), *value[at + 1 :]]
    return draw.choice(JUNK)


def some_body(draw: random.Random, known: dict[str, list[Any]], name: str, one: Callable[[random.Random], Any]) -> Any:
    body = {"model": "phi", name: [one(draw) for _ in range(draw.choice([1, 1, 2, 4]))], "max_tokens": 5}
    for field in draw.sample(sorted(known), draw.randint(0, 3)):
        body[field] = draw.choice([known[field][0], draw.choice(known[field])])
    for _ in range(draw.choice([0, 0, 1, 1, 2])):
        body = spoil(draw, body)
    return body


@pytest.mark.parametrize("api", APIS, ids=lambda api: api[0].__name__.rpartition(".")[2])
def test_any_body_is_parsed_or_refused(api: tuple[ModuleType, dict[str, list[Any]], str, Any]) -> None:
    module, known, name, one = api
    draw = random.Random(4)
    asks = refusals = 0
    for _ in range(5_000):
        body = some_body(draw, known, name, one)
        try:
            ask = module.parse(body, V)
        except WireError as error:
            refusals += 1
            assert error.status == 400, error.message
            assert "\n" not in error.message and len(error.message) < 500
            error.message.encode()
            continue
        asks += 1
        can_be_served(ask)
    assert asks > 800 and refusals > 800, (asks, refusals)


def can_be_served(ask: Ask) -> None:
    assert isinstance(ask, Ask)
    assert bool(ask.messages) != bool(ask.prompts)
    if ask.messages:
        check_messages(ask.messages)
    json.dumps([ask.messages, ask.prompts, ask.tools, ask.repeated], allow_nan=False, ensure_ascii=False).encode()
    assert check_tools(ask.tools) == ask.tools
    tools_text(ask.tools)
    drawn = ask.sampling
    make_sampler(drawn.temp, drawn.top_p, drawn.min_p, drawn.top_k, drawn.seed)
    make_logits_processors(
        drawn.logit_bias, drawn.repetition_penalty,
        presence_penalty=drawn.presence_penalty, frequency_penalty=drawn.frequency_penalty,
    )  # fmt: skip
    assert ask.tool_choice in ("none", "auto", "required", *(tool["function"]["name"] for tool in ask.tools))
    assert ask.max_tokens is None or ask.max_tokens >= 1
    assert 1 <= ask.n <= 8 and len(ask.stop) <= 16 and all(ask.stop)

"""Requests as clients send them: each is answered, and the header says what had no effect."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from tests.unit.server.clients import CLIENTS, SHELL, function, history
from tests.unit.server.in_process import InProcessServer, events_of

SHORT = {"max_tokens": 4}
HI = [{"role": "user", "content": "hi"}]
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
SERVER_TOOL = {"type": "web_search_20250305", "name": "web_search"}
TOOL = function("shell", SHELL)
NO_TOOL = {"type": "function", "function": {"name": "x"}}
FILES = {"type": "file_search"}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}
NULLS = {"type": "object", "properties": {}, "required": None}
ORPHAN = {"role": "tool", "tool_call_id": "?", "content": None}


def ended(path: str, events: list[Any]) -> bool:
    """True if a stream has its API's end."""
    if "messages" in path:
        return events[-1]["type"] == "message_stop"
    if "responses" in path:
        return events[-1]["type"] in ("response.completed", "response.incomplete")
    return any(choice["finish_reason"] for event in events for choice in event["choices"])


@pytest.mark.parametrize("path", CLIENTS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_clients_conversation_is_answered(
    server: InProcessServer, path: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    body = CLIENTS[path]() | {"stream": stream, "seed": 1}
    if not any("max" in name for name in body):
        body["max_output_tokens" if "responses" in path else "max_tokens"] = 30
    body |= {name: 30 for name in ("max_tokens", "max_completion_tokens") if body.get(name) not in (None, -1)}
    if body.get("max_tokens") == -1:
        body["stop"] = ["a", "e", "i", "o"]  # a random model ends seldom
    with caplog.at_level(logging.INFO, "phi4_mlx.server"):
        answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    assert sum("ignored=" in record.message for record in caplog.records) == 1  # a line for each request
    ignored = answer.headers["x-phi4-ignored"]
    assert ignored.isascii() and len(ignored) <= 1_010 and "model" in ignored.split(", ")
    if stream:
        assert ended(path, events_of(answer))
    else:
        assert answer.json()["model"] == "tiny"


def test_claude_codes_header_says_what_was_ignored(server: InProcessServer) -> None:
    answer = server.post("/v1/messages", CLIENTS["/v1/messages?beta=true"]() | {"stream": False, "max_tokens": 3})
    ignored = answer.headers["x-phi4-ignored"].split(", ")
    assert {"tools[2]", "tools[3]", "thinking", "context_management", "metadata"} <= set(ignored)
    assert "output_config.effort" in ignored and "tools[0]" not in ignored and "max_tokens" not in ignored
    assert "cache_control" not in answer.headers["x-phi4-ignored"]


VARIATIONS: list[tuple[str, str, dict[str, Any], int, str]] = [
    # what, path, what the body has beside a short question, status, a path in the header ("" for none)
    ("no model", CHAT, {"model": None}, 200, ""),
    ("an empty model", CHAT, {"model": ""}, 200, ""),
    ("an unknown model", CHAT, {"model": "gpt-4o"}, 200, "model"),
    ("a model of another type", CHAT, {"model": 5}, 400, ""),
    ("no limit", CHAT, {"max_tokens": -1, "stop": ["a", "e", "i", "o"]}, 200, ""),
    ("a limit of 0", CHAT, {"max_tokens": 0, "stop": ["a", "e", "i", "o"]}, 200, ""),
    ("a limit beyond the room", CHAT, {"max_tokens": 900_000, "stop": ["a", "e", "i", "o"]}, 200, "max_tokens"),
    ("a limit of many digits", CHAT, {"max_tokens": 10**30, "stop": ["a", "e", "i", "o"]}, 200, ""),
    ("a limit that is no number", CHAT, {"max_tokens": "many"}, 400, ""),
    ("no max_tokens", MESSAGES, {"max_tokens": None, "stop_sequences": ["a", "e", "i", "o"]}, 200, ""),
    ("unknown fields", CHAT, {"user": "me", "store": True, "service_tier": "auto", "né\r\nw": 1}, 200, "n???w"),
    ("empty unknown fields", CHAT, {"user": "", "store": False, "extra": None, "more": []}, 200, ""),
    ("reasoning", CHAT, {"reasoning_effort": "high"}, 200, "reasoning_effort"),
    ("thinking", MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1_024}}, 200, "thinking"),
    ("context management", MESSAGES, {"context_management": {"edits": []}}, 200, "context_management"),
    ("a container and servers", MESSAGES, {"container": "c", "mcp_servers": [{"url": "u"}]}, 200, "mcp_servers"),
    ("a server's tool", MESSAGES, {"tools": [SERVER_TOOL]}, 200, "tools[0]"),
    (
        "a choice of a server's tool",
        MESSAGES,
        {"tools": [SERVER_TOOL], "tool_choice": {"type": "tool", "name": "web_search"}},
        200,
        "tool_choice",
    ),
    ("any of a server's tools", MESSAGES, {"tools": [SERVER_TOOL], "tool_choice": {"type": "any"}}, 200, "tool_choice"),
    ("a choice without tools", MESSAGES, {"tool_choice": {"type": "any"}}, 400, ""),
    ("a choice of no tool", CHAT, {"tools": [TOOL], "tool_choice": NO_TOOL}, 400, ""),
    ("a hosted tool", RESPONSES, {"tools": [FILES], "tool_choice": FILES}, 200, "tools[0]"),
    ("a custom tool", RESPONSES, {"tools": [{"type": "custom", "name": "p"}]}, 200, "tools[0]"),
    ("two tools of a name", CHAT, {"tools": [TOOL, TOOL]}, 200, "tools[1]"),
    ("a tool in the other API's form", CHAT, {"tools": [{"type": "function", **TOOL["function"]}]}, 200, ""),
    ("the same the other way", RESPONSES, {"tools": [TOOL], "tool_choice": {}}, 200, ""),
    ("allowed tools", CHAT, {"tools": [TOOL], "tool_choice": ALLOWED}, 200, ""),
    ("required: null", CHAT, {"tools": [function("f", NULLS)]}, 200, ""),
    ("functions of old", CHAT, {"functions": [TOOL["function"]], "function_call": "auto"}, 200, "functions"),
    ("a demanded function of old", CHAT, {"functions": [], "function_call": {"name": "f"}}, 400, ""),
    ("modalities", CHAT, {"modalities": ["text", "audio"], "audio": {"voice": "x"}}, 200, "modalities"),
    ("a schema of json_object", CHAT, {"response_format": {"type": "json_object", "schema": {"enum": [7]}}}, 200, ""),
    ("top_logprobs alone", CHAT, {"top_logprobs": 2}, 200, "top_logprobs"),
    ("an empty stop string", CHAT, {"stop": ["", "zzz"]}, 200, "stop"),
    ("top_p 0", CHAT, {"top_p": 0}, 200, "top_p"),
    ("a top_p that float32 has not", CHAT, {"top_p": 1e-46, "temperature": 2}, 200, "top_p"),
    ("a hot temperature", CHAT, {"temperature": "hot"}, 400, ""),
    ("seeds at their limits", CHAT, {"seed": -(2**63)}, 200, ""),
    ("biases at their limits", CHAT, {"logit_bias": {"5": 100, "6": -100}, "temperature": 0}, 200, ""),
    ("a bias beyond them", CHAT, {"logit_bias": {"5": 1e308}}, 400, ""),
    ("a stored response", RESPONSES, {"previous_response_id": "resp_1"}, 400, ""),
    ("a stored conversation", RESPONSES, {"conversation": "conv_1"}, 400, ""),
    ("work in the background", RESPONSES, {"background": True}, 400, ""),
    ("not in the background", RESPONSES, {"background": False, "store": False}, 200, ""),
    ("truncation", RESPONSES, {"truncation": "auto", "text": {"verbosity": "low"}}, 200, "text.verbosity"),
    ("metadata of numbers", RESPONSES, {"metadata": {"a": 1}}, 200, "metadata"),
    ("a new picture", CHAT, {"messages": [{"role": "user", "content": [PICTURE]}]}, 400, ""),
    (
        "an old picture",
        CHAT,
        {"messages": [{"role": "user", "content": [PICTURE]}, {"role": "assistant", "content": "ok"}, *HI]},
        200,
        "messages[0].content[0]",
    ),
    ("a picture in a result", RESPONSES, {"input": [
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image", "image_url": "x"}]},
    ]}, 200, "input[1].output[0]"),
    ("arguments cut", CHAT, history('"{\\"a\\": 1"'), 200, ""),
    ("arguments null", CHAT, history("null"), 200, ""),
    ("arguments as null", CHAT, history('"null"'), 200, ""),
    ("arguments as a list", CHAT, history('"[1, 2]"'), 200, ""),
    ("arguments with a line break", CHAT, history('"{\\"a\\": \\"x\\ny\\"}"'), 200, ""),
    ("arguments as an object", CHAT, history('{"a": {"b": 1}}'), 200, ""),
    ("arguments of half a character", CHAT, history('"{\\"a\\": \\"\\\\ud800\\"}"'), 200, ""),
    ("a result without a call", CHAT, {"messages": [ORPHAN, *HI]}, 200, ""),
    ("a call without a result", CHAT, {"messages": [*history("null")["messages"][:2], *HI]}, 200, ""),
    ("an empty answer", CHAT, {"messages": [*HI, {"role": "assistant", "content": None}, *HI]}, 200, ""),
    ("calls with one id", CHAT, {"messages": [*history("{}")["messages"] * 2, *HI]}, 200, ""),
    ("a reference and no message", RESPONSES, {"input": [{"type": "item_reference", "id": "msg_1"}]}, 400, ""),
    ("a reference", RESPONSES, {"input": [{"type": "item_reference", "id": "msg_1"}, *HI]}, 200, "input[0]"),
    ("a compaction", RESPONSES, {"input": [{"type": "compaction", "encrypted_content": "x"}, *HI]}, 200, "input[0]"),
    ("a long prompt", CHAT, {"messages": [{"role": "user", "content": "word " * 20_000}]}, 400, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "more", "status", "named"), [each[1:] for each in VARIATIONS], ids=[e[0] for e in VARIATIONS]
)
def test_a_variation_is_answered_or_refused_in_a_line(
    server: InProcessServer, path: str, more: dict[str, Any], status: int, named: str
) -> None:
    question: dict[str, Any] = (
        {"input": "hi", "max_output_tokens": 4} if path == RESPONSES else {"messages": HI, **SHORT}
    )
    body = {"model": "tiny", "seed": 1, **question, **more}
    answer = server.post(path, body)
    assert answer.status_code == status, answer.text
    if status == 400:
        message = answer.json()["error"]["message"]
        assert message and "\n" not in message and len(message) <= 2_000
        return
    ignored = answer.headers.get("x-phi4-ignored", "").split(", ")
    assert (named in ignored) if named else ignored == [""], ignored
    assert answer.json()["model"] == "tiny"
    if stated := more.get("response_format"):
        assert answer.json()["choices"][0]["message"]["content"] == str(stated["schema"]["enum"][0])


OPTIONAL: dict[str, dict[str, Any]] = {
    CHAT: {
        "user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "k",
        "reasoning_effort": "low", "reasoning": {"effort": "low"}, "prediction": {"type": "content", "content": "x"},
        "verbosity": "low", "safety_identifier": "s", "web_search_options": {"a": 1}, "moderation": {"a": 1},
        "thinking": {"type": "enabled"}, "chat_template_kwargs": {"a": 1}, "keep_alive": 5,
    },
    MESSAGES: {
        "thinking": {"type": "adaptive"}, "betas": ["b"], "container": "c", "mcp_servers": [{"url": "u"}],
        "service_tier": "auto", "metadata": {"user_id": "me"}, "context_management": {"edits": [1]},
        "inference_geo": "x",
    },
    RESPONSES: {
        "reasoning": {"effort": "low"}, "store": True, "truncation": "auto", "service_tier": "auto",
        "include": ["reasoning.encrypted_content"], "safety_identifier": "s", "prompt_cache_key": "k", "user": "me",
        "max_tool_calls": 3, "context_management": [{"type": "compaction"}], "stream_options": {"a": True},
    },
}  # fmt: skip


@pytest.mark.parametrize("path", OPTIONAL)
def test_each_optional_field_is_ignored_and_named(server: InProcessServer, path: str) -> None:
    question: dict[str, Any] = {"input": "hi", "max_output_tokens": 1} if path == RESPONSES else {"messages": HI}
    question |= {"model": "tiny"} | ({} if path == RESPONSES else {"max_tokens": 1})
    for name, value in OPTIONAL[path].items():
        answer = server.post(path, {**question, name: value})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-phi4-ignored"] == name


def test_text_of_the_history_reaches_the_prompt(server: InProcessServer) -> None:
    def count(body: dict[str, Any]) -> int:
        return int(server.post("/v1/messages/count_tokens", body).json()["input_tokens"])

    body = CLIENTS["/v1/messages?beta=true"]()
    messages = body["messages"]
    results = messages[1]["content"].pop(4)
    without_results = count(body)
    messages[1]["content"].insert(4, results)
    assert count(body) > without_results
    messages[1]["content"][0]["thinking"] = "much longer thoughts " * 50
    assert count(body) == count(CLIENTS["/v1/messages?beta=true"]())


@pytest.mark.parametrize("path", [
    "//v1/chat/completions", "/v1/chat/completions/", "/v1//chat//completions", "/v1/v1/chat/completions",
])  # fmt: skip
def test_paths_as_clients_join_them(server: InProcessServer, path: str) -> None:
    assert server.post(path, {"messages": HI, **SHORT}).status_code == 200


def test_models_are_listed_for_both_kinds_of_clients(server: InProcessServer) -> None:
    for path in ("/v1/models", "/v1/models/", "//v1/models"):
        assert server.request("GET", path).json()["data"][0]["id"] == "tiny"
    assert server.request("GET", "/v1/models/tiny/").json()["id"] == "tiny"
    assert server.request("GET", "/v1/models/a/b").status_code == 404
    fitting = {"context_length": server.supervisor.longest, "kind": "instruct"}
    (listed,) = server.request("GET", "/v1/models").json()["data"]
    assert listed == server.request("GET", "/v1/models/tiny").json() and fitting.items() <= listed.items()
    listed = server.request("GET", "/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert listed["data"][0]["type"] == "model" and listed["has_more"] is False and listed["first_id"] == "tiny"


def test_other_methods_and_routes(server: InProcessServer) -> None:
    assert server.request("HEAD", "/v1/models").status_code == 200
    options = server.request("OPTIONS", "/v1/chat/completions")
    assert options.status_code == 204 and options.headers["allow"] == "POST"
    wrong = server.request("GET", "/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert server.request("GET", "/v1/nowhere").status_code == 404
    embeddings = server.post("/v1/embeddings", {"model": "tiny", "input": "x"})
    assert embeddings.status_code == 501 and embeddings.headers["x-should-retry"] == "false"


def test_errors_are_short(server: InProcessServer) -> None:
    tools = [function("x" * 200 + str(n), {"type": "object", "properties": {}}) for n in range(1_000)]
    for body in (
        {"tools": tools, "tool_choice": {"type": "function", "function": {"name": "none"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"x" * 60_000: 1, "not": {}}}}},
        {"response_format": {"type": "regex", "pattern": "(" * 4_000}},
        {"response_format": {"type": "grammar", "grammar": "start: " + "y" * 60_000}},
        {"k" * 1_000_000: 5, "temperature": "hot"},
    ):
        answer = server.post(CHAT, {"messages": HI, **SHORT, **body})
        assert answer.status_code in (200, 400) and len(answer.content) < 4_100, answer.text[:300]
        assert len(str(answer.headers)) < 3_000


def test_an_adapter_is_never_picked_by_chance(tmp_path: Any) -> None:
    server = InProcessServer(tmp_path, adapters=("mine", "org/name"))
    for path in ("/v1/models/org/name", "/v1/models/org%2Fname", "//v1/models/org/name/"):
        assert server.request("GET", path).json()["id"] == "org/name"
    assert server.post(CHAT, {"messages": HI, **SHORT}).json()["model"] == "tiny"
    unknown = server.post(CHAT, {"messages": HI, "model": "min", **SHORT})
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"


def test_an_error_shows_no_path_of_this_machine(tmp_path: Any) -> None:
    folder = tmp_path / "some where" / "mine"
    server = InProcessServer(tmp_path, adapters=("mine",), settings={"adapters": {"mine": str(folder)}})
    answer = server.post(CHAT, {"messages": HI, "model": "mine", **SHORT})
    assert answer.status_code == 400 and "adapter 'mine'" in answer.text
    assert str(tmp_path) not in answer.text and "some where" not in answer.text


def test_a_prompts_room_is_its_limit(tmp_path: Any) -> None:
    server = InProcessServer(tmp_path, settings={"kv_limit_bytes": 2**19})
    room = server.supervisor.longest
    assert 100 < room < 2_000
    ids = [5] * (room - 3)
    answer = server.post("/v1/completions", {"prompt": ids, "max_tokens": 100, "logit_bias": {"2": -100}}).json()
    assert answer["usage"]["total_tokens"] <= room
    full = server.post("/v1/completions", {"prompt": [5] * room, "max_tokens": 1})
    assert full.status_code == 400 and full.json()["error"]["code"] == "context_length_exceeded"
    long = {"messages": [{"role": "user", "content": "word " * room}]}
    assert server.post("/v1/messages", long).json()["error"]["message"].startswith("prompt is too long: ")
    assert server.post("/v1/messages/count_tokens", long).json()["input_tokens"] > room


def test_the_header_is_a_line_of_limited_length(server: InProcessServer) -> None:
    fields = {f"field_{n}_" + "é" * 50: 1 for n in range(2_000)}
    answer = server.post(CHAT, {"messages": HI, **SHORT, **fields})
    header = answer.headers["x-phi4-ignored"]
    assert answer.status_code == 200 and header.isascii() and len(header) <= 1_010 and header.endswith(", ...")
    assert json.loads(answer.text)["choices"]

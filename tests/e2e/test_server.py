"""`python -m phi4_mlx.server` as a process: the official clients, what is hostile, and what goes wrong in its midst."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import mlx.core as mx
import openai
import pytest

from phi4_mlx.adapters.layers import adapter_layers, add_adapter
from phi4_mlx.checkpoint import load
from phi4_mlx.generation.stream import generate
from phi4_mlx.server.guard import BODY_BYTES
from phi4_mlx.tokens.tokenizer import load_tokenizer
from tests.adapters import save_adapter
from tests.e2e.server_process import ROOT, Server, alive, answer_on, events, serving, until

REQUEST_S = 1.5  # what a request may take to be sent, here
ENDLESS: dict[str, Any] = {"logit_bias": {"1000": -100, "1003": -100}, "max_tokens": 3000}  # no end of the turn
AUDIT = """
import os, sys

def hook(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        with open(os.environ["AUDIT_LOG"], "a") as file:
            print(event, args[1:], file=file)

sys.addaudithook(hook)
with open(os.environ["AUDIT_LOG"], "a") as file:
    print("hooked", os.getpid(), file=file)
"""


@pytest.fixture(scope="module")
def audit_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says which sockets the server's processes have connected."""
    return tmp_path_factory.mktemp("audit") / "log"


@pytest.fixture(scope="module")
def server(audit_log: Path) -> Iterator[Server]:
    (audit_log.parent / "sitecustomize.py").write_text(AUDIT)
    env = {"PYTHONPATH": str(audit_log.parent), "AUDIT_LOG": str(audit_log)}
    with serving("--decode-concurrency", "8", "--max-queue", "8", request_s=REQUEST_S, env=env) as it:
        yield it


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none is needed", max_retries=0, timeout=60)


@pytest.fixture
def claude(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none is needed", max_retries=0, timeout=60)


def idle(server: Server) -> bool:
    metrics = server.metrics()
    return metrics["answers_under_way"] == 0 and metrics["jobs"] == 0


# -- the clients -----------------------------------------------------------------------------------------------------

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
WEATHER: list[Any] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the weather in Paris?"},
]
CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: dict[str, Any] = {"name": "get_weather", "description": "The weather of a city", "parameters": CITY}
TOOLS: list[Any] = [{"type": "function", "function": TOOL}]
TAG = load_tokenizer(ROOT / "phi4_mlx" / "demo").control_ids["<|tool_call|>"]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_chat_is_what_generate_says(client: openai.OpenAI) -> None:
    model, tokenizer = load("demo")
    whole = generate(model, tokenizer, tokenizer.apply_chat_template(HELLO), max_tokens=60)
    answer = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, max_tokens=60)
    assert answer.choices[0].message.content == whole and answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.total_tokens > answer.usage.completion_tokens > 0
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=HELLO,
            temperature=0,
            max_tokens=60,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert len(chunks) > 4 and chunks[-1].usage == answer.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}  # type: ignore[union-attr]
    )


def test_several_answers_with_stops_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, n=3, seed=5, max_tokens=20, stop=["."], logprobs=True, top_logprobs=2
    )
    again = client.chat.completions.create(model="demo", messages=HELLO, n=3, seed=5, max_tokens=20, stop=["."])
    assert [it.message.content for it in answer.choices] == [it.message.content for it in again.choices]
    assert all("." not in (it.message.content or "") for it in answer.choices)
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content
        assert all(len(it.top_logprobs) == 2 and it.logprob <= 0 for it in choice.logprobs.content)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools_are_called(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": WEATHER,
        "tools": TOOLS,
        "tool_choice": choice,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
    call = answer.message.tool_calls[0].function
    assert call.name == "get_weather" and list(json.loads(call.arguments)) == ["city"]
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed and streamed[0].function.arguments == call.arguments
    # The result is told, and the model goes on from it.
    result = {"role": "tool", "tool_call_id": answer.message.tool_calls[0].id, "content": '{"degrees": 7}'}
    asked |= {"messages": [*WEATHER, answer.message, result], "tool_choice": "none"}
    said = client.chat.completions.create(**asked).choices[0]
    assert said.message.content and not said.message.tool_calls


def test_an_answer_obeys_its_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="demo", messages=HELLO, response_format=form, seed=seed, max_tokens=40
        )
        person = json.loads(answer.choices[0].message.content or "")
        assert list(person) == ["name", "age"] and isinstance(person["age"], int)
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, response_format={"type": "json_object"}, max_tokens=60
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_an_answer_beside_tools_calls_one_or_obeys_its_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    asked: dict[str, Any] = {"model": "demo", "messages": WEATHER, "tools": TOOLS, "response_format": form}
    told = set()
    for choice, bias in [("auto", -100), ("auto", 100), ("required", -100), ("none", 100)]:
        answer = client.chat.completions.create(
            **asked, tool_choice=choice, logit_bias={str(TAG): bias}, seed=1, max_tokens=60
        ).choices[0]
        if answer.finish_reason == "tool_calls":
            assert answer.message.tool_calls and not answer.message.content
            assert list(json.loads(answer.message.tool_calls[0].function.arguments)) == ["city"]
        else:
            assert not answer.message.tool_calls
            assert list(json.loads(answer.message.content or "")) == ["name", "age"]
        told.add((choice, answer.finish_reason))
    assert told == {("auto", "stop"), ("auto", "tool_calls"), ("required", "tool_calls"), ("none", "stop")}
    tool: Any = {"type": "function", **TOOL}
    response = client.responses.create(
        model="demo", input="Say hello.", tools=[tool], text={"format": {"type": "json_object"}}, max_output_tokens=60,
        extra_body={"logit_bias": {str(TAG): -100}},
    )  # fmt: skip
    assert isinstance(json.loads(response.output_text), dict)


def test_completions_and_responses(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=["One two", "Three"], max_tokens=5, temperature=0, n=2)
    assert len(answer.choices) == 4 and answer.choices[0].text == answer.choices[1].text
    streamed = client.completions.create(model="demo", prompt="One two", max_tokens=5, temperature=0, stream=True)
    assert "".join(it.choices[0].text for it in streamed) == answer.choices[0].text
    response = client.responses.create(model="demo", input="Say hello.", temperature=0)
    chat = client.chat.completions.create(model="demo", messages=HELLO, temperature=0)
    assert response.output_text == chat.choices[0].message.content and response.status == "completed"
    with client.responses.stream(model="demo", input="Say hello.", temperature=0) as stream:
        assert "".join(it.delta for it in stream if it.type == "response.output_text.delta") == response.output_text


def test_anthropics_client(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 60, "messages": HELLO, "extra_body": {"temperature": 0}}
    message = claude.messages.create(**asked)
    chat = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, max_tokens=60)
    assert message.content[0].type == "text" and message.content[0].text == chat.choices[0].message.content
    assert message.stop_reason == "end_turn"
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == message.content[0].text
    tool: Any = {"name": "get_weather", "input_schema": CITY}
    asked |= {"messages": WEATHER[1:], "tools": [tool], "tool_choice": {"type": "tool", "name": "get_weather"}}
    called = claude.messages.create(**asked)
    assert called.stop_reason == "tool_use" and called.content[-1].type == "tool_use"
    assert list(called.content[-1].input) == ["city"]
    counted = claude.messages.count_tokens(model="demo", messages=HELLO)
    assert counted.input_tokens == (chat.usage.prompt_tokens if chat.usage else None)


def test_mistakes_are_the_clients_exceptions(
    server: Server, client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="../demo", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="demo", messages=HELLO, temperature=3)
    assert "temperature" in str(bad.value) and bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="demo", messages=HELLO, max_tokens=5000)
    assert long.value.code == "context_length_exceeded" and "4096" in str(long.value)
    with pytest.raises(openai.InternalServerError) as none:
        client.embeddings.create(model="demo", input="x")
    assert none.value.status_code == 501 and none.value.response.json()["error"]["message"]
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="none such", max_tokens=5, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError) as bad_too:
        claude.messages.create(model="demo", max_tokens=5, messages=[])
    assert bad_too.value.response.json()["type"] == "error"


def test_models_health_metrics_and_the_page(server: Server, client: openai.OpenAI) -> None:
    assert [it.id for it in client.models.list()] == ["demo"] and client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    health = server.get("/health")
    assert health.status_code == 200 and health.json() == {"status": "ok", "restarts": 0, "jobs": 0}
    before = server.metrics()
    drawn = server.ask().json()["usage"]["completion_tokens"]
    after = server.metrics()
    assert after["drawn_tokens_total"] - before["drawn_tokens_total"] == drawn > 0 and after["up"] == 1
    assert after["prefilled_tokens_total"] - before["prefilled_tokens_total"] <= 12
    route = 'answers_total{route="/v1/chat/completions",status="200"}'
    assert after[route] == before.get(route, 0) + 1
    page = server.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert server.get("/nowhere").status_code == 404 and server.get("/v1/chat/completions").status_code == 405
    assert server.post("/health", {}).json()["error"]["type"] == "invalid_request_error"


# -- those who leave -------------------------------------------------------------------------------------------------


def test_a_stream_that_is_closed_is_forgotten_at_once(server: Server, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="demo", messages=HELLO, stream=True, **ENDLESS)
    for count, _ in enumerate(stream):
        if count == 3:
            break
    assert server.metrics()["answers_under_way"] == 1
    stream.close()
    assert until(lambda: idle(server)) < 1.0
    drawn = server.metrics()["drawn_tokens_total"]
    time.sleep(0.2)
    assert server.metrics()["drawn_tokens_total"] == drawn


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_client_that_leaves_is_forgotten_also_when_nothing_was_sent_yet(server: Server, path: str) -> None:
    body = {"model": "demo", "messages": HELLO, "input": "Say hello.", **ENDLESS}
    with server.raw() as connection:
        send(connection, path, json.dumps(body if path != "/v1/responses" else {"model": "demo", **ENDLESS_INPUT}))
        until(lambda: server.metrics()["answers_under_way"] == 1)
    assert until(lambda: idle(server)) < 1.0


ENDLESS_INPUT: dict[str, Any] = {"input": "Say hello.", "logit_bias": ENDLESS["logit_bias"], "max_output_tokens": 3000}


def test_a_long_prompt_whose_client_has_left_keeps_nobody_waiting(server: Server) -> None:
    ids = [n % 900 for n in range(4000)]
    with server.raw() as connection:
        send(connection, "/v1/completions", json.dumps({"model": "demo", "prompt": ids, "max_tokens": 50}))
        until(lambda: server.metrics()["jobs"] == 1)
    start = time.monotonic()
    assert server.ask().status_code == 200
    assert time.monotonic() - start < 5
    # One of 200,000 tokens is refused before it is read.
    start = time.monotonic()
    answer = server.post("/v1/completions", {"model": "demo", "prompt": [7] * 200_000})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    answer = server.ask("hello " * 200_000)
    assert answer.status_code == 400 and time.monotonic() - start < 5


def test_more_than_may_wait_are_told_to_come_again(server: Server, client: openai.OpenAI) -> None:
    connections = [server.raw() for _ in range(2)]
    for connection in connections:
        send(connection, "/v1/completions", json.dumps({"model": "demo", "prompt": "x", "n": 8, **ENDLESS}))
    until(lambda: server.metrics()["jobs"] == 16)
    refused = server.ask()
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="demo", messages=HELLO)
    assert server.get("/health").status_code == 200
    for connection in connections:
        connection.close()
    until(lambda: idle(server))
    assert server.ask().status_code == 200


# -- what is hostile -------------------------------------------------------------------------------------------------


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": HELLO, "max_tokens": 2} | fields


def parts(*given: dict[str, Any]) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": list(given)}])


def schema(value: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})


MANY = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(5000)}}
REMOTE = {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/schema.json"}}}
HOSTILE: dict[str, Any] = {
    "logit_bias beyond the vocabulary": chat(logit_bias={"1000000": 1}),
    "logit_bias below it": chat(logit_bias={"-1": 1}),
    "logit_bias too strong": chat(logit_bias={"5": 1e9}),
    "stop 5": chat(stop=5),
    "stop [5]": chat(stop=[5]),
    "stop [[]]": chat(stop=[[]]),
    "stop empty": chat(stop=""),
    "17 stops": chat(stop=["x"] * 17),
    "top_k 1e9": b'{"model":"demo","messages":[{"role":"user","content":"x"}],"top_k":1e9}',
    "seed 2**64": chat(seed=2**64),
    "n 9": chat(n=9),
    "n -1": chat(n=-1),
    "n 2**40": chat(n=2**40),
    "max_tokens 0": chat(max_tokens=0),
    "max_tokens -1": chat(max_tokens=-1),
    "max_tokens 1e12": chat(max_tokens=10**12),
    "temperature NaN": b'{"model":"demo","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
    "temperature 1e400": b'{"model":"demo","messages":[{"role":"user","content":"x"}],"temperature":1e400}',
    "top_logprobs 21": chat(logprobs=True, top_logprobs=21),
    "bad UTF-8": b'{"model":"demo","messages":[{"role":"user","content":"\xff\xfe"}]}',
    "UTF-16": json.dumps(chat(stop=5)).encode("utf-16"),
    "depth 100,000": b"[" * 100_000,
    "depth 100,000, whole": b'{"model":"demo","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "depth 900": b'{"model":"demo","messages":' + b"[" * 900 + b"]" * 900 + b"}",
    "5,000 digits": b'{"model":"demo","messages":[{"role":"user","content":"x"}],"seed":' + b"9" * 5000 + b"}",
    "4,000 digits": b'{"model":"demo","messages":[{"role":"user","content":"x"}],"seed":' + b"9" * 4000 + b"}",
    "lone surrogate": b'{"model":"demo","messages":[{"role":"user","content":"\\ud800"}]}',
    "lone surrogate in a key": b'{"model":"demo","\\udfff":1,"messages":[{"role":"user","content":"x"}]}',
    "no JSON": b"hello",
    "nothing": b"",
    "a number": b"5",
    "null": b"null",
    "no messages": {"model": "demo"},
    "empty messages": chat(messages=[]),
    "messages of text": chat(messages="x"),
    "messages of null": chat(messages=[None]),
    "unknown role": chat(messages=[{"role": "wizard", "content": "x"}]),
    "role with control tokens": chat(messages=[{"role": "<|system|>", "content": "x"}]),
    "no content": chat(messages=[{"role": "user"}]),
    "image part": parts({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}),
    "image in the text's place": parts({"type": "text", "text": {"url": "x"}}),
    "audio part": parts({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
    "tool without a name": chat(tools=[{"type": "function", "function": {"parameters": CITY}}]),
    "tool with 5,000 properties": chat(tools=[{"type": "function", "function": {"name": "t", "parameters": MANY}}]),
    "tool with a remote $ref": chat(tools=[{"type": "function", "function": {"name": "t", "parameters": REMOTE}}]),
    "tool name with control tokens": chat(tools=[{"type": "function", "function": {"name": "<|end|>"}}]),
    "tool_choice of none such": chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "x"}}),
    "schema with a remote $ref": schema(REMOTE),
    "schema with 5,000 properties": schema(MANY),
    "schema of 70 KB": schema({"type": "string", "description": "x" * 70_000}),
    "schema that nothing obeys": schema({"type": "object", "properties": {"a": False}, "required": ["a"]}),
    "schema without bottom": schema({"$ref": "#"}),
    "schema with not": schema({"not": {"type": "string"}}),
    "regex that is none": chat(response_format={"type": "regex", "pattern": "("}),
    "grammar that is none": chat(response_format={"type": "grammar", "grammar": "start: ("}),
    "prompt of 200,000 tokens": chat(messages=[{"role": "user", "content": "hello " * 200_000}]),
    "white space of a megabyte": chat(messages=[{"role": "user", "content": "x" + " " * 1_000_000 + "x"}]),
    "functions": chat(functions=[{"name": "x"}]),
    "model null": chat(model=None),
    "model 5": chat(model=5),
    "model empty": chat(model=""),
    "model of 10,000 letters": chat(model="x" * 10_000),
    "model in __proto__": chat(model={"__proto__": "demo"}),
}
NO_MODELS = [
    "../demo",
    "..",
    "/etc/passwd",
    "demo\0",
    "demo/",
    "./demo",
    "d\u0435mo",
    "demo\u200b",
    "DEMO",
    " demo",
    "~root",
]


def send(connection: socket.socket, path: str, body: str | bytes) -> None:
    data = body.encode() if isinstance(body, str) else body
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    )
    connection.sendall(head.encode() + b"\r\n" + data)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused_in_json_and_the_next_is_answered(server: Server, name: str) -> None:
    given = HOSTILE[name]
    data = given if isinstance(given, bytes) else json.dumps(given).encode()
    start = time.monotonic()
    answer = httpx.post(
        server.url + "/v1/chat/completions", content=data, headers={"content-type": "application/json"}, timeout=30
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and len(error["message"]) < 500
    assert time.monotonic() - start < 5
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize("name", NO_MODELS)
def test_names_are_looked_up_and_nothing_else(server: Server, name: str) -> None:
    assert server.ask(model=name).status_code == 404
    assert server.post("/v1/messages", chat(model=name)).json()["error"]["type"] == "not_found_error"
    escaped = "".join(f"%{byte:02x}" for byte in name.encode())
    assert server.get(f"/v1/models/{escaped}").status_code == 404


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": -1},
        {"top_k": 2**31 - 1},
        {"top_p": 1e-9},
        {"temperature": 1e-300},
        {"max_tokens": None},
        {"stop": None},
        {"messages": [{"role": "user", "content": "a\0b"}]},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {"messages": [{"role": "user", "content": "<|end|><|assistant|><|system|>\U0001f600\ufffd\u2028"}]},
        {"logit_bias": {str(n): -100 for n in range(1000)}},
        {"repetition_penalty": 100, "presence_penalty": 2, "frequency_penalty": -2, "min_p": 1},
        {"unknown": {"nested": [1, 2]}},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_what_is_only_odd_is_answered(server: Server, fields: dict[str, Any]) -> None:
    answer = server.post("/v1/chat/completions", chat(**fields))
    assert answer.status_code == 200, answer.text


def test_what_a_browser_could_be_made_to_send_is_refused(server: Server) -> None:
    body = json.dumps(chat()).encode()
    for headers, wanted in [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json", "host": "evil.example"}, 403),
        ({"content-type": "application/json", "origin": "https://evil.example"}, 403),
        ({"content-type": "application/json", "origin": server.url}, 200),
    ]:
        answer = httpx.post(server.url + "/v1/chat/completions", content=body, headers=headers, timeout=30)
        assert answer.status_code == wanted and "access-control-allow-origin" not in answer.headers
        assert wanted == 200 or answer.json()["error"]["message"]
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert httpx.options(server.url + "/v1/chat/completions", headers=preflight).status_code == 403


# -- the wire --------------------------------------------------------------------------------------------------------

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def drip(connection: socket.socket, data: bytes, pause_s: float, give_up_s: float) -> float:
    """Sends a byte at a time until the other end has had enough; returns the seconds until then."""
    start = time.monotonic()
    try:
        for byte in data:
            connection.sendall(bytes([byte]))
            if time.monotonic() - start > give_up_s:
                break
            time.sleep(pause_s)
            connection.setblocking(False)
            try:
                if connection.recv(1) == b"":
                    break
            except BlockingIOError:
                pass
            finally:
                connection.setblocking(True)
    except ConnectionError:
        pass
    return time.monotonic() - start


@pytest.mark.parametrize("first", [b"", HEAD[:20], b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_headers_that_drip_are_cut_off(server: Server, first: bytes) -> None:
    with server.raw() as connection:
        connection.sendall(first)
        if first.endswith(b"\r\n\r\n"):
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")  # the next request is the slow one
        took = drip(connection, (HEAD + b"X-A: " + b"y" * 1000) if not first else b"X" * 1000, 0.05, 4 * REQUEST_S)
    assert took < 2 * REQUEST_S
    assert server.get("/health").status_code == 200


def test_a_body_that_drips_is_answered_408(server: Server) -> None:
    with server.raw() as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        start = time.monotonic()
        answer = answer_on(connection)
    assert answer.startswith(b"HTTP/1.1 408") and time.monotonic() - start < 2 * REQUEST_S


def test_a_silent_connection_is_closed(server: Server) -> None:
    with server.raw() as connection:
        start = time.monotonic()
        assert answer_on(connection) == b"" and time.monotonic() - start < 2 * REQUEST_S


def test_ten_gigabytes_are_refused_before_they_come(server: Server) -> None:
    for extra in (b"", b"Expect: 100-continue\r\n"):
        with server.raw() as connection:
            start = time.monotonic()
            connection.sendall(HEAD + extra + b"Content-Length: 10737418240\r\n\r\n")
            answer = answer_on(connection)
        assert answer.startswith(b"HTTP/1.1 413") and b"100 Continue" not in answer and time.monotonic() - start < 1


def test_an_endless_body_is_cut_off_at_the_limit(server: Server) -> None:
    sent, chunk = 0, b"%x\r\n" % 65536 + b" " * 65536 + b"\r\n"
    with server.raw() as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            while sent < 4 * BODY_BYTES:
                connection.sendall(chunk)
                sent += 65536
        except ConnectionError:
            pass
    assert sent < BODY_BYTES + 2**23  # what was under way in the sockets' buffers
    # The same under a route that has no body at all.
    with server.raw() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert drip(connection, b"1\r\nx\r\n" * 1000, 0.02, 4 * REQUEST_S) < 3 * REQUEST_S
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize("pause_s", [0.0, 0.001])
def test_headers_of_a_megabyte_are_refused(server: Server, pause_s: float) -> None:
    with server.raw() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        try:
            for _ in range(64):
                connection.sendall(b"X-A: " + b"y" * 16_000 + b"\r\n")
                time.sleep(pause_s)
            connection.sendall(b"\r\n")
        except ConnectionError:
            pass
        answer = answer_on(connection)
    assert answer == b"" or answer.split()[1] in (b"400", b"431")
    assert server.get("/health", headers={"x-a": "y" * 40_000}).status_code in (400, 431)
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize(
    "garbage",
    [
        bytes(range(256)) * 40,
        b"\0" * 10_000,
        b"GET / HTTP/9.9\r\n\r\n" * 500,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"\xff" * 10_000,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n" + b"x" * 10_000,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200,
        b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3,
    ],
    ids=lambda data: repr(data[:30]),
)
def test_garbage_is_refused(server: Server, garbage: bytes) -> None:
    with server.raw() as connection:
        connection.sendall(garbage)
        connection.settimeout(0.5)
        answer = answer_on(connection)
    assert b"HTTP/1.1 5" not in answer and b"root:" not in answer
    assert server.get("/health").status_code == 200


def test_nothing_of_all_that_was_more_than_a_line_on_the_terminal(server: Server) -> None:
    assert server.ask().status_code == 200
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)[-3000:]
    assert server.metrics()["engine_restarts_total"] == 0 and idle(server)


def test_nothing_was_connected_to(server: Server, audit_log: Path) -> None:
    lines = audit_log.read_text().splitlines()
    assert len([line for line in lines if line.startswith("hooked")]) >= 2  # the server, and its engine
    assert [line for line in lines if not line.startswith("hooked")] == []


# -- servers of their own --------------------------------------------------------------------------------------------


def test_a_killed_engine_is_replaced_while_the_server_serves() -> None:
    with serving("--decode-concurrency", "4") as server:
        body = chat(stream=True, **ENDLESS)
        with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=30) as stream:
            told = events(stream)
            next(told)
            next(told)
            old = server.engine
            os.kill(old, signal.SIGKILL)
            killed = time.monotonic()
            statuses = set()
            until(lambda: statuses.add(server.get("/health").json()["status"]) or "restarting" in statuses, 2)
            assert server.get("/health").status_code in (200, 503)
            assert server.ask().status_code == 200  # it waits for the new one
            assert time.monotonic() - killed < 5
            last = list(told)[-1]
        assert last["error"]["type"] == "overloaded_error" and "ask again" in last["error"]["message"]
        health = server.get("/health")
        assert health.status_code == 200 and health.json() == {"status": "ok", "restarts": 1, "jobs": 0}
        assert server.engine != old and server.metrics()["engine_restarts_total"] == 1


def test_a_server_that_is_told_to_end_lets_answers_end() -> None:
    server = Server()
    engine = server.engine
    with httpx.stream(
        "POST",
        server.url + "/v1/chat/completions",
        json=chat(stream=True, **(ENDLESS | {"max_tokens": 150})),
        timeout=30,
    ) as stream:
        told = events(stream)
        for _ in range(3):
            next(told)
        server.process.send_signal(signal.SIGTERM)
        rest = list(told)
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(10) == 0  # what systemd and launchd take for the end that they asked for
    until(lambda: not alive(engine))
    with pytest.raises(httpx.ConnectError):
        server.get("/health")
    assert not any("Traceback" in line for line in server.lines)


def test_no_engine_is_left_behind_by_a_server_that_is_killed() -> None:
    server = Server()
    engine = server.engine
    connection = server.raw()
    send(connection, "/v1/chat/completions", json.dumps(chat(**ENDLESS)))
    until(lambda: server.metrics()["answers_under_way"] == 1)
    server.process.kill()
    server.process.wait()
    until(lambda: not alive(engine))
    connection.close()


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "phi4_mlx.server", *words],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def broken_model(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((ROOT / "phi4_mlx" / "demo" / name).read_bytes())
    return folder


def test_mistakes_are_one_line_and_code_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, message in [
            (["--model", "demo", "--port", str(port)], "choose another --port"),
            (["--model", "none/such", "--port", "0"], "none/such"),
            (["--model", str(broken_model(tmp_path)), "--port", "0"], "model.safetensors"),
            (["--model", "demo", "--port", "0", "--adapters", str(tmp_path / "nowhere")], "nowhere"),
            (["--model", "demo", "--port", "0", "--adapters", str(tmp_path)], "adapter_config.json"),
            (["--model", "demo", "--host", "0.0.0.0"], "--api-key"),
            (["--model", "demo", "--port", "70000"], "--port"),
        ]:
            done = run_command(*words)
            assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
            assert message in done.stderr.splitlines()[-1], done.stderr


def test_adapters_are_those_of_one_folder_by_name(tmp_path: Path) -> None:
    model, _ = load("demo")
    add_adapter(model, rank=2)
    for layer in adapter_layers(model).values():
        layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    for folder in ("allowed/mine", "outside"):
        (tmp_path / folder).mkdir(parents=True)
        save_adapter(model, tmp_path / folder, {})
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "allowed" / "empty").mkdir()
    with serving("--adapters", str(tmp_path / "allowed")) as server:
        assert [it["id"] for it in server.get("/v1/models").json()["data"]] == ["demo", "mine"]
        asked = {"temperature": 0, "max_tokens": 20}
        base, mine = (server.ask(model=name, **asked).json()["choices"][0]["message"] for name in ("demo", "mine"))
        assert base["content"] != mine["content"]
        for name in ("link", "empty", "../outside", "mine/../mine", str(tmp_path / "outside"), "mine\0"):
            assert server.ask(model=name, **asked).status_code == 404

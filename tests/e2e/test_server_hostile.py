"""Requests that nobody should send: hostile bodies, browsers' requests, slow and malformed HTTP."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from phi4_mlx.server.limits import BODY_BYTES
from tests.e2e.server_process import CITY, HANG_S, Server, answer_on, audited, chat, until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with audited(tmp_path_factory.mktemp("audit"), request_s=1.5) as it:
        yield it


def parts(*given: dict[str, Any]) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": list(given)}])


def schema(value: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})


TOOLS: list[Any] = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]
MANY = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(5000)}}
REMOTE = {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/schema.json"}}}
INT64 = 2**63
NUMBERS: dict[str, Any] = {
    "constant": {"const": -INT64},
    "enumeration": {"enum": [-INT64, 1]},
    "equal bounds": {"type": "integer", "minimum": -INT64, "maximum": -INT64},
    "bounds of int64": {"type": "integer", "minimum": -INT64, "maximum": INT64 - 1},
    "bounds in two places": {"allOf": [{"type": "integer"}, {"minimum": -INT64}, {"maximum": -INT64}]},
    "bounds of floats": {"type": "integer", "minimum": -1e308, "maximum": -1e308},
    "product of multiples": {"allOf": [{"type": "integer", "multipleOf": n} for n in (97, 89, 83, 79)]},
}
BOMB = "start: T\nT: ~/.*a.{14}.*/ & /.*b.{14}.*/ & /.*c.{14}.*/\n"
CRASH = 'start: %json {"const": -9223372036854775808}'
HOSTILE: dict[str, Any] = {
    "logit_bias beyond the vocabulary": chat(logit_bias={"1000000": 1}),
    "logit_bias below it": chat(logit_bias={"-1": 1}),
    "logit_bias too strong": chat(logit_bias={"5": 1e9}),
    "stop 5": chat(stop=5),
    "stop [5]": chat(stop=[5]),
    "stop [[]]": chat(stop=[[]]),
    "17 stops": chat(stop=["x"] * 17),
    "top_k 1e99": b'{"model":"demo","messages":[{"role":"user","content":"x"}],"top_k":1e99}',
    "seed 2**64": chat(seed=2**64),
    "n 9": chat(n=9),
    "n -1": chat(n=-1),
    "n 2**40": chat(n=2**40),
    "max_tokens as text": chat(max_tokens="5"),
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
    "not JSON": b"hello",
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
    "image in place of text": parts({"type": "text", "text": {"url": "x"}}),
    "audio part": parts({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
    "tool without a name": chat(tools=[{"type": "function", "function": {"parameters": CITY}}]),
    "tool with 5,000 properties": chat(tools=[{"type": "function", "function": {"name": "t", "parameters": MANY}}]),
    "tool name with control tokens": chat(tools=[{"type": "function", "function": {"name": "<|end|>"}}]),
    "tool_choice of an unknown tool": chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "x"}}),
    "schema that nothing satisfies": schema({"type": "object", "properties": {"a": False}, "required": ["a"]}),
    "schema of an unknown type": schema({"type": "strange"}),
    "grammar that takes minutes": chat(response_format={"type": "grammar", "grammar": BOMB}),
    "grammar that crashes its compiler": chat(response_format={"type": "grammar", "grammar": CRASH}),
    "invalid regex": chat(response_format={"type": "regex", "pattern": "("}),
    "invalid grammar": chat(response_format={"type": "grammar", "grammar": "start: ("}),
    "prompt of 200,000 tokens": chat(messages=[{"role": "user", "content": "hello " * 200_000}]),
    "white space of a megabyte": chat(messages=[{"role": "user", "content": "x" + " " * 1_000_000 + "x"}]),
    "function_call": chat(functions=[{"name": "x"}], function_call={"name": "x"}),
    "model 5": chat(model=5),
    "model of 10,000 letters": chat(model="x" * 10_000),
    "model in __proto__": chat(model={"__proto__": "demo"}),
}
UNKNOWN_MODELS = [
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


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_refused_in_json_and_the_next_is_answered(server: Server, name: str) -> None:
    given = HOSTILE[name]
    data = given if isinstance(given, bytes) else json.dumps(given).encode()
    start = time.monotonic()
    answer = httpx.post(
        server.url + "/v1/chat/completions", content=data, headers={"content-type": "application/json"}, timeout=HANG_S
    )
    took = time.monotonic() - start
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and len(error["message"]) < 500
    start = time.monotonic()
    assert server.ask().status_code == 200
    assert took < 50 * (time.monotonic() - start)


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_at_the_end_of_int64_cost_at_most_one_request(server: Server, name: str) -> None:
    tool = {"name": "t", "parameters": {"type": "object", "properties": {"a": NUMBERS[name]}, "required": ["a"]}}
    tools = [{"type": "function", "function": tool}]
    assert server.post("/v1/chat/completions", schema(NUMBERS[name])).status_code in (200, 400)
    for choice in ("auto", "required"):
        assert server.post("/v1/chat/completions", chat(tools=tools, tool_choice=choice)).status_code == 200
    health = server.get("/health").json()
    assert (health["status"], health["restarts"]) == ("ok", 0)


@pytest.mark.slow
def test_nothing_is_fetched_for_a_remote_reference(server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "t", "parameters": REMOTE}}]
    assert server.post("/v1/chat/completions", chat(tools=tools)).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [MANY, {"type": "string", "description": "x" * 70_000}, {"$ref": "#"}],
    ids=["5,000 properties", "70 KB", "a reference to itself"],
)
def test_a_schema_that_is_too_complex_keeps_its_type_alone(server: Server, given: Any) -> None:
    answer = server.post("/v1/chat/completions", schema(given))
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-phi4-ignored"].startswith("the schema: ")


def test_217_tools_fit_into_a_request(server: Server) -> None:
    tools = [{"type": "function", "function": {"name": f"t{n}"}} for n in range(217)]
    choice = {"type": "function", "function": {"name": "t216"}}
    answer = server.post("/v1/chat/completions", chat(tools=tools, tool_choice=choice, temperature=0, max_tokens=60))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "t216"


@pytest.mark.parametrize("name", UNKNOWN_MODELS)
def test_names_are_looked_up_and_nothing_else(server: Server, name: str) -> None:
    answer = server.ask(model=name)  # the only model answers for any name, under its own
    assert answer.status_code == 200 and answer.json()["model"] == "demo"
    assert answer.headers["x-phi4-ignored"] == "model"
    until(lambda: any("/v1/chat/completions 200" in line and "ignored=model" in line for line in server.lines))
    assert server.post("/v1/messages", chat(model=name)).json()["model"] == "demo"
    escaped = "".join(f"%{byte:02x}" for byte in name.encode())
    assert server.get(f"/v1/models/{escaped}").status_code == (200 if name == "demo/" else 404)


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": -1},
        {"top_k": 2**31 - 1},
        {"top_p": 1e-9},
        {"temperature": 1e-300},
        {"max_tokens": None},
        {"stop": None},
        {"stop": ""},
        {"stop": ["", "x"]},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 10**12},
        {"top_p": 0},
        {"top_p": 1e-46},
        {"model": None},
        {"model": ""},
        {"functions": [{"name": "x"}]},
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
def test_an_odd_body_is_answered(server: Server, fields: dict[str, Any]) -> None:
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
        answer = httpx.post(server.url + "/v1/chat/completions", content=body, headers=headers, timeout=HANG_S)
        assert answer.status_code == wanted and "access-control-allow-origin" not in answer.headers
        assert wanted == 200 or answer.json()["error"]["message"]
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert httpx.options(server.url + "/v1/chat/completions", headers=preflight).status_code == 403


# -- the wire --------------------------------------------------------------------------------------------------------

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def drip(connection: socket.socket, data: bytes, pause_s: float) -> int:
    """Sends a byte at a time until the other end closes; returns the number of bytes sent."""
    for sent, byte in enumerate(data):
        try:
            connection.sendall(bytes([byte]))
            time.sleep(pause_s)
            connection.setblocking(False)
            if connection.recv(1) == b"":
                return sent + 1
        except BlockingIOError:
            pass
        except ConnectionError:
            return sent
        finally:
            connection.setblocking(True)
    return len(data)


@pytest.mark.slow
@pytest.mark.parametrize("first", [b"", HEAD[:20], b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_headers_that_drip_are_cut_off(server: Server, first: bytes) -> None:
    data = HEAD + b"X-A: " + b"y" * 300 if not first else b"X" * 400  # 20 seconds of it, against a limit of 1.5
    with server.raw() as connection:
        connection.sendall(first)
        if first.endswith(b"\r\n\r\n"):
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")  # the next request is the slow one
        assert drip(connection, data, 0.05) < len(data)
    assert server.get("/health").status_code == 200


def test_a_body_that_does_not_arrive_is_answered_408(server: Server) -> None:
    with server.raw() as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        assert answer_on(connection).startswith(b"HTTP/1.1 408")


def test_a_silent_connection_is_closed(server: Server) -> None:
    with server.raw() as connection:
        assert connection.recv(1) == b""


def test_ten_gigabytes_are_refused_before_they_are_sent(server: Server) -> None:
    for extra in (b"", b"Expect: 100-continue\r\n"):
        with server.raw() as connection:
            connection.sendall(HEAD + extra + b"Content-Length: 10737418240\r\n\r\n")
            answer = answer_on(connection)
        assert answer.startswith(b"HTTP/1.1 413") and b"100 Continue" not in answer


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
    assert sent < BODY_BYTES + 2**23  # the rest was in the sockets' buffers
    # The same on a route without a body; this would take 12 seconds, against a limit of 1.5.
    with server.raw() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        data = b"1\r\nx\r\n" * 100
        assert drip(connection, data, 0.02) < len(data)
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


def test_nothing_caused_a_traceback_or_a_restart(server: Server) -> None:
    assert server.ask().status_code == 200
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)[-3000:]
    assert server.metrics()["engine_restarts_total"] == 0 and server.idle()

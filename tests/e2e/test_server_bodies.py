"""Bodies that nobody should send, over HTTP: each is answered or refused in JSON, and the server keeps running.

`BODIES=5000 python -m pytest -s tests/e2e/test_server_bodies.py` is the full size, which takes minutes.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.server_process import HANG_S, Server, answer_on, serving

BODIES = int(os.environ.get("BODIES", "300"))
PROBE_EVERY = 25  # bodies between two ordinary requests

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}
ODD_SCHEMA = {
    "$defs": {"a": {"type": ["string", "null"], "pattern": "^[a-z]{2}$"}},
    "anyOf": [{"$ref": "#/$defs/a"}, {"oneOf": [{"const": 1}, {"const": "x"}]}, {"type": "number", "multipleOf": 0.5}],
    "allOf": [{"enum": ["ab", 1, None]}],
}
TEXT = {"type": "text", "text": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
FUNCTION = {"name": "weather", "description": "Tells", "parameters": PERSON}
BIG, SMALL = {"temperature": 0.5, "top_p": 0.9, "stop": ["x", "y"], "seed": 3, "logit_bias": {"5": -1}}, {"min_p": 0.1}
CHAT: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [TEXT, TEXT]}], **BIG},
    {"messages": [{"role": "user", "content": "hi"}], "n": 2, "logprobs": True, "top_logprobs": 2, "stream": True,
     "stream_options": {"include_usage": True}, **SMALL},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                  {"role": "tool", "tool_call_id": "1", "content": "7"}],
     "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto", "parallel_tool_calls": False},
    {"messages": [{"role": "user", "content": "hi"}], "response_format": {
        "type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": PERSON}}},
    {"messages": [{"role": "user", "content": "hi"}], "response_format": {
        "type": "json_schema", "json_schema": {"name": "x", "schema": ODD_SCHEMA}}},
    {"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "regex", "pattern": "[a-z]+(b|c)?"}},
    {"messages": [{"role": "user", "content": "hi"}], "response_format": {
        "type": "grammar", "grammar": 'start: "a" | B\nB: /[0-9]{1,3}/\n'}},
    {"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "choice", "choices": ["a", "b"]}},
]  # fmt: skip
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": ["One two", "Three"], "echo": True, "n": 2, "best_of": 2, **BIG},
    {"prompt": [[1, 2, 3], [4]], "logprobs": 2, "stream": True, "frequency_penalty": 1, "repetition_penalty": 1.1},
]
RESPONSES: list[dict[str, Any]] = [
    {"input": "hi", "instructions": "Be kind.", "metadata": {"a": "b"}, "top_logprobs": 1, "temperature": 1},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
               {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
               {"type": "function_call_output", "call_id": "1", "output": "7"}, {"type": "reasoning", "summary": []}],
     "tools": [{"type": "function", **FUNCTION}], "tool_choice": {"type": "function", "name": "weather"},
     "include": ["message.output_text.logprobs"], "stream": True},
    {"input": "hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": PERSON}}, "truncation": None},
]  # fmt: skip
MESSAGES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}], "system": [TEXT], "stop_sequences": ["x"], "stream": True,
     **SMALL},
    {"messages": [{"role": "user", "content": [TEXT]},
                  {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "weather", "input": {}}]},
                  {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [TEXT]}, TEXT]}],
     "tools": [{"name": "weather", "input_schema": PERSON}], "tool_choice": {"type": "any"},
     "thinking": {"type": "disabled"}},
]  # fmt: skip
ROUTES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES,
}
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**63, -(2**63) - 1, 2**64, 10**40, 10**400,
    "", " ", "a", "\0", "null", "1e999", "\u2028\ufffd", "\U0001f600" * 40, "<|end|>", "x" * 5_000, "(", "[", "\\",
    "(a*)*b", "a{1000000}", "\\p{L}+", "start: start", "%json {}", "../..", "http://127.0.0.1:1/x", "#/$defs/a", "#",
    "/a(?=b)/", "date-time", "object", "array", "function", "auto", "required", "stream", "\ud83d", "a\udc00",
    [], [[]], [None], [[[[]]]], ["a"] * 20, [1, "a", None], {}, {"": {}}, {"type": 5}, {"type": "object"},
    {"a": {"b": []}},
    {"type": "text", "text": None}, {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}, {"\0": "\0"},
    {"$ref": "#"}, {"$ref": "http://127.0.0.1:1/x"}, {"pattern": "("}, {"enum": []}, {"not": {}}, {"properties": [1]},
    {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}, {"minLength": 10**9},
    {"type": "array", "minItems": 10**6, "items": {"type": "string"}}, {"multipleOf": 1e-300}, {"maximum": "x"},
]  # fmt: skip
NAMES = [
    "model", "messages", "prompt", "input", "role", "content", "tools", "tool_choice", "tool_calls", "type", "function",
    "name", "arguments", "parameters", "schema", "response_format", "text", "format", "pattern", "grammar", "choices",
    "max_tokens", "max_completion_tokens", "stop", "seed", "logit_bias", "top_k", "logprobs", "stream", "n",
    "stream_options",
    "suffix", "functions", "modalities", "system", "thinking", "metadata", "include", "properties", "required", "items",
    "enum", "const", "$ref", "$defs", "anyOf", "additionalProperties", "patternProperties", "prefixItems", "minItems",
    "maxLength", "format", "minimum", "exclusiveMaximum", "multipleOf", "x-guidance", "__proto__", "", "\0",
]  # fmt: skip
NUMBERS = [b"NaN", b"-Infinity", b"1e400", b"9" * 5_000, b"0x10", b"01", b"1.", b"-"]
SCRAPS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\\udc00\\ud800", b"\\u0000", b"\\", b'"', b"'",
    b",", b"{", b"}", b"[" * 3_000, b"]", b"//", b"NaN", b":", b"\r\n\r\n", b"1e5", b"-", b'{"a":' * 500, b"null",
]  # fmt: skip


def spoiled(draw: random.Random, value: Any) -> Any:
    """The value with one element, at any depth, replaced by another."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.9:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        new = value.copy()
        kind = draw.random()
        if kind < 0.1:
            del new[key]
        elif kind < 0.2 and isinstance(new, dict):
            new[draw.choice(NAMES)] = draw.choice(JUNK)
        elif kind < 0.2:
            new += [new[key]] * draw.choice([1, 1, 200])
        else:
            new[key] = spoiled(draw, new[key])
        return new
    if draw.random() < 0.1:
        for _ in range(draw.choice([1, 5, 150, 400])):
            value = [value] if draw.random() < 0.5 else {draw.choice(NAMES): value}
        return value
    return draw.choice(JUNK)


def cut_up(draw: random.Random, data: bytes) -> bytes:
    """JSON with an error in it, or without."""
    at = draw.randrange(len(data))
    kind = draw.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + draw.choice(SCRAPS) + data[at + draw.randrange(3) :]
    if kind == 2:
        return data[:at] + bytes(draw.randrange(256) for _ in range(draw.randint(1, 9))) + data[at:]
    if kind == 3:
        return data.replace(draw.choice([b"1", b"2", b"5", b"0.5", b"true"]), draw.choice(NUMBERS))
    if kind == 4:
        return data + draw.choice([data, b"\0", b",", b"}", b" " * 100_000, b"\n\n[]"])
    return data.decode(errors="replace").encode(draw.choice(["utf-16", "utf-16-le", "utf-32", "utf-7", "utf-8-sig"]))


def some_request(draw: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """A route, a body and its headers."""
    path = draw.choice(list(ROUTES))
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body: Any = {"model": "demo", limit: draw.randint(1, 3), **draw.choice(ROUTES[path])}
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        body = spoiled(draw, body)
    data = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if draw.random() < 0.25:
        data = cut_up(draw, data)
    kind = "application/json" if draw.random() < 0.95 else draw.choice(["text/plain", "", "a/b;" * 9, "image/png"])
    return path, data, {"content-type": kind}


def check_answer(answer: httpx.Response) -> None:
    """Checks that it is an answer, or an error in JSON with a message of one line."""
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500, answer.text
        message = answer.json()["error"]["message"]
        assert message and "\n" not in message and len(message) < 500, answer.text
    elif answer.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
        told = [json.loads(line) for line in lines if line != "[DONE]"]
        assert told and not any(each.get("type") == "error" or "error" in each for each in told)
    else:
        assert "error" not in answer.json() or answer.json()["error"] is None


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--max-tokens", "3") as it:
        yield it


@pytest.mark.slow
def test_any_body_is_answered_or_refused_and_the_next_is_answered(server: Server) -> None:
    draw = random.Random(1)
    statuses: Counter[int] = Counter()
    slowest, probes = 0.0, []
    with httpx.Client(base_url=server.url, timeout=HANG_S) as http:
        for number in range(BODIES):
            path, data, headers = some_request(draw)
            start = time.monotonic()
            try:
                answer = http.post(path, content=data, headers=headers)
                check_answer(answer)
                assert http.get("/health").json() == {"status": "ok", "restarts": 0, "jobs": 0}
            except Exception as error:
                raise AssertionError(f"body {number} to {path}, {headers}: {data[:2_000]!r}") from error
            slowest = max(slowest, time.monotonic() - start)
            statuses[answer.status_code] += 1
            if number % PROBE_EVERY == 0:
                start = time.monotonic()
                probe = server.ask(temperature=0, max_tokens=3)
                probes.append(time.monotonic() - start)
                assert probe.status_code == 200 and probe.json()["choices"][0]["message"]["content"]
    print(json.dumps({"bodies": BODIES, "statuses": dict(sorted(statuses.items())), "slowest_s": round(slowest, 2)}))
    assert slowest < 100 * statistics.median(probes), (slowest, probes)
    assert statuses[200] > BODIES / 20 and statuses[400] > BODIES / 4
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)[-3_000:]


# -- each of these once crashed or blocked the server ----------------------------------------------------------------


def chain(link: str, count: int) -> dict[str, Any]:
    """A schema with a chain of references; the last is defined first, so that no single one looks deep."""
    links = {str(n): json.loads(link.replace("NEXT", f"#/$defs/{n + 1}")) for n in reversed(range(count))}
    return {"$defs": {str(count): {}, **links}, "prefixItems": [{"$ref": "#/$defs/0"}]}


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def grammar(text: str) -> dict[str, Any]:
    return {"type": "grammar", "grammar": text}


def rules(body: str, count: int) -> dict[str, Any]:
    """A grammar in which each rule contains the next."""
    row = "".join(f"a{n}: {body.replace('NEXT', f'a{n + 1}')}\n" for n in range(count))
    return grammar(f'start: a0\n{row}a{count}: "x"\n')


CRASHES: dict[str, Any] = {
    "a chain of 4,000 rules": rules("NEXT", 4_000),
    "a chain of rules with brackets": rules('((((NEXT "y")?)*"z")?)*', 1_000),
    "a pattern of many letters": {"type": "regex", "pattern": "a{4000000000}"},
    "a bound of 400 digits": form({"type": "number", "exclusiveMinimum": 10**400}),
}
LOOSENED = {
    "a chain of 1,300 references": form(chain('{"anyOf":[{"$ref":"NEXT"}]}', 1_300)),
    "a chain of references in arrays": form(chain('{"items":{"$ref":"NEXT"}}', 900)),
    "a chain of 450 references, first to last": form(
        {"$ref": "#/$defs/0", "$defs": {str(n): {"items": {"$ref": f"#/$defs/{n + 1}"}} for n in range(450)}}
    ),
    "a reference of 5,000 digits": form({"anyOf": [{}], "$ref": "#/anyOf/" + "9" * 5_000}),
}


@pytest.mark.parametrize("name", CRASHES)
def test_an_impossible_grammar_is_refused(server: Server, name: str) -> None:
    answer = server.ask(response_format=CRASHES[name])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "response_format"
    assert server.get("/health").json()["restarts"] == 0


@pytest.mark.parametrize("name", LOOSENED)
def test_what_cannot_be_kept_is_left_out_and_named(server: Server, name: str) -> None:
    answer = server.ask(response_format=LOOSENED[name])
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-phi4-ignored"].startswith("the schema: ")
    assert server.get("/health").json()["restarts"] == 0


def timed(server: Server, **more: Any) -> float:
    """The time of a chat completion in seconds."""
    start = time.monotonic()
    assert server.ask(**more).status_code == 200
    return time.monotonic() - start


@pytest.mark.parametrize(
    "given", [form({"default": {"pattern": "a{4000000000}"}}), form({"const": {"pattern": "(ab){4000000000}"}})]
)
def test_a_pattern_that_is_only_data_costs_nothing(server: Server, given: Any) -> None:
    usual = timed(server, response_format=form({}))
    assert timed(server, response_format=given) < 20 * usual


@pytest.mark.slow
def test_a_grammar_without_an_end_does_not_block_other_answers(server: Server) -> None:
    words = grammar("start: " + " | ".join(f'"w{n}" start' for n in range(300)))
    asked = threading.Thread(target=server.ask, kwargs={"response_format": words, "max_tokens": 3})
    asked.start()
    others = 0
    while asked.is_alive():
        assert server.ask().status_code == 200
        others += 1
    assert others >= 4  # one or two, if they wait for the grammar


@pytest.mark.slow
@pytest.mark.parametrize("part", ["[]", "0", '""', "{}"])
def test_a_body_of_many_values_does_not_block_other_requests(server: Server, part: str) -> None:
    data = b"[" + b",".join([part.encode()] * (2**24 // (len(part) + 1) - 1)) + b"]"
    answers: list[httpx.Response] = []

    def send() -> None:
        headers = {"content-type": "application/json"}
        answers.append(httpx.post(server.url + "/v1/chat/completions", content=data, headers=headers, timeout=HANG_S))

    sender = threading.Thread(target=send)
    start = time.monotonic()
    sender.start()
    waits = []
    while sender.is_alive():
        asked = time.monotonic()
        assert server.get("/health").status_code == 200
        waits.append(time.monotonic() - asked)
    took = time.monotonic() - start
    assert answers[0].status_code == 400
    if part in ("[]", "{}"):  # refused before it is parsed, because that would block even other threads
        assert "opening brackets" in answers[0].json()["error"]["message"]
    else:
        assert max(waits) < 0.6 * took


def test_invalid_http_is_refused_in_json(server: Server) -> None:
    for garbage in (
        b"\0" * 100,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ):
        with server.raw() as connection:
            connection.sendall(garbage)
            head, _, body = answer_on(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and b"content-type: application/json" in head.lower()
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_an_unknown_models_name_does_not_become_a_line_of_the_metrics(server: Server) -> None:
    before = len(server.get("/metrics").text.splitlines())
    for n in range(20):
        assert server.get(f'/v1/models/none-{n}"}} 1').status_code == 404
    text = server.get("/metrics").text
    assert "none-" not in text and len(text.splitlines()) <= before + 1


def test_nothing_caused_a_traceback_or_a_restart(server: Server) -> None:
    assert server.get("/health").json() == {"status": "ok", "restarts": 0, "jobs": 0}
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)[-3_000:]

"""One line for each request: its facts, its level, and nothing that a client could forge or should not tell."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.server.apis.wire import WireError
from phi4_mlx.server.app import App
from phi4_mlx.server.engine.protocol import Failure
from phi4_mlx.server.guard import LOOPBACK_NAMES, Guard
from phi4_mlx.server.log import LOG
from phi4_mlx.server.request_log import RequestLog, write_refusal
from phi4_mlx.server.tools import ServerTools
from phi4_mlx.tools.toolbox import Toolbox
from tests.unit.server.in_process import InProcessServer
from tests.unit.server.test_guard import ask

CHAT = "/v1/chat/completions"
SECRET = "my secret words"
HI = [{"role": "user", "content": SECRET}]
NUMBER = r"\d+\.\d{3}"


class Lines(logging.Handler):
    """The lines so far, each as (level, text)."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append((record.levelname, record.getMessage()))

    @property
    def last(self) -> str:
        return self.told[-1][1]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, before = Lines(), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    yield handler
    LOG.removeHandler(handler)
    LOG.setLevel(before)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> InProcessServer:
    return InProcessServer(tmp_path_factory.mktemp("logged"))


def endless(server: InProcessServer) -> dict[str, Any]:
    """The fields of a request whose answer does not end by itself."""
    return {"messages": HI, "logit_bias": {str(each): -100 for each in server.supervisor.tokenizer.eos_ids}}


def facts(line: str) -> dict[str, str]:
    """The named values of a line."""
    found = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line)
    return {name: json.loads(value) if value.startswith('"') else value for name, value in found}


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_has_the_tokens_the_times_and_the_end(stream: bool, logged: InProcessServer, lines: Lines) -> None:
    body = endless(logged) | {"max_tokens": 5, "stream": stream, "model": "other"}
    answer = logged.post(CHAT, body)
    assert answer.status_code == 200
    (told,) = lines.told
    pattern = (
        rf"127\.0\.0\.1 POST /v1/chat/completions 200 total_s={NUMBER} model=tiny stream={'yes' if stream else 'no'} "
        rf"prompt_tokens=\d+ cached_tokens=\d+ answer_tokens=5 first_s={NUMBER} finish=length ignored=model"
    )
    assert told[0] == "INFO" and re.fullmatch(pattern, told[1]), told
    if not stream:
        usage, line = answer.json()["usage"], facts(told[1])
        assert int(line["prompt_tokens"]) == usage["prompt_tokens"]
        assert int(line["cached_tokens"]) == usage["prompt_tokens_details"]["cached_tokens"]
        assert float(line["first_s"]) <= float(line["total_s"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": HI, "max_tokens": 3}),
        ("/v1/responses", {"input": SECRET, "max_output_tokens": 3}),
        ("/v1/completions", {"prompt": [SECRET, "x"], "max_tokens": 3, "n": 2}),
    ],
)
def test_every_api_has_such_a_line(path: str, body: dict[str, Any], logged: InProcessServer, lines: Lines) -> None:
    biases = endless(logged)["logit_bias"]
    assert logged.post(path, body | {"logit_bias": biases}).status_code == 200
    (told,) = lines.told
    line = facts(told[1])
    assert f"POST {path} 200" in told[1] and line["finish"] == "length" and line["model"] == "tiny"
    assert int(line["answer_tokens"]) == 3 * (4 if path == "/v1/completions" else 1)
    assert SECRET not in told[1]


REFUSED: list[tuple[str, Any, str, str]] = [
    (CHAT, {"messages": HI, "temperature": 9}, "WARNING", "temperature must be a number from 0 to 2, not 9"),
    (CHAT, {"messages": SECRET}, "WARNING", "messages must be a list, not '...'"),
    (CHAT, {"messages": [{"role": SECRET}]}, "WARNING", "messages[0].role must be one of"),
    (CHAT, {"messages": [*HI, f"it's {SECRET}"]}, "WARNING", ""),
    (CHAT, {"messages": [*HI, f'"it\'s" {SECRET} \\']}, "WARNING", ""),
    (CHAT, {"messages": [*HI, SECRET + "\ud800"]}, "WARNING", "unpaired surrogate: '...'"),
    (CHAT, {"messages": [*HI, {"role": "user", "content": [{"type": SECRET * 9}]}]}, "WARNING", ""),
    (CHAT, {"messages": [*HI, {"role": "user", "content": {SECRET: [SECRET * 9]}}]}, "WARNING", ""),
    (CHAT, {"messages": HI, "tools": [{"type": "function", "function": {"name": SECRET * 9}}]}, "WARNING", ""),
    ("/v1/responses", {"input": [{"type": "message", "role": f"'{SECRET}\\"}]}, "WARNING", ""),
    (CHAT, {"messages": HI, "stop": [[SECRET]]}, "WARNING", "stop must be"),
    (CHAT, {"messages": HI, "tool_choice": SECRET}, "WARNING", "tool_choice must be one of"),
    (CHAT, {"messages": HI, "logit_bias": {SECRET: 1}}, "WARNING", "logit_bias names token '...'"),
    ("/v1/embeddings", {"input": SECRET}, "ERROR", "this model makes no embeddings"),
    ("/v1/nowhere", {"input": SECRET}, "WARNING", "there is no such route"),
    ("/v1/completions", {"prompt": [7] * 20_000}, "WARNING", "prompt is too long"),
    ("/v1/completions", {"prompt": {"a": SECRET}}, "WARNING", "prompt"),
]


@pytest.mark.parametrize(("path", "body", "level", "reason"), REFUSED)
def test_a_refusal_has_its_reason_and_no_words_of_the_body(
    path: str, body: Any, level: str, reason: str, logged: InProcessServer, lines: Lines
) -> None:
    data = json.dumps(body).encode()
    answer = logged.request("POST", path, content=data, headers={"content-type": "application/json"})
    assert answer.status_code >= 400, answer.text
    (told,) = lines.told
    assert told[0] == level and f" {answer.status_code} " in told[1] and reason in facts(told[1])["error"]
    assert "secret" not in told[1] and "words" not in told[1]


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {"host": "evil.example"}, 403),
        ("GET", {"origin": "https://evil.example"}, 403),
        ("POST", {"content-type": "text/plain"}, 415),
        ("POST", {"content-length": "9" * 12}, 413),
        ("GET", {"x": "y" * 2**15}, 431),
        ("GET", {"authorization": "Bearer not the k3y"}, 401),
        ("GET", {"x-api-key": "not the k3y"}, 401),
    ],
)
def test_refusals_of_the_guard_are_logged_without_a_key(
    method: str, headers: dict[str, str], status: int, lines: Lines
) -> None:
    app = RequestLog(Guard(App(None).starlette(), "s3cret", LOOPBACK_NAMES))  # type: ignore[arg-type]
    given = ({} if "x-api-key" in headers else {"authorization": "Bearer s3cret"}) | headers
    assert asyncio.run(ask(app, method, "/v1/models", given))[0] == status
    (told,) = lines.told
    assert told[0] == "WARNING" and f" {method} /v1/models {status} " in told[1] and "error=" in told[1]
    assert "s3cret" not in told[1] and "k3y" not in told[1]


def test_what_is_asked_for_each_second_is_not_logged(lines: Lines) -> None:
    class Engine:
        state, restarts, jobs = "restarting", 0, 0

        async def ping(self) -> None:
            return None

    class Service:
        supervisor = Engine()

    app = RequestLog(Guard(App(Service()).starlette(), None, LOOPBACK_NAMES))  # type: ignore[arg-type]
    assert asyncio.run(ask(app, "GET", "/health"))[0] == 503  # the state, and no refusal
    assert asyncio.run(ask(app, "GET", "/metrics"))[0] == 200
    assert lines.told == []
    assert asyncio.run(ask(app, "GET", "/"))[0] == 200
    assert asyncio.run(ask(app, "GET", "/health", {"host": "evil.example"}))[0] == 403
    assert [line.split()[2] for _, line in lines.told] == ["/", "/health"]
    LOG.setLevel(logging.DEBUG)
    asyncio.run(ask(app, "GET", "/health"))
    assert lines.told[-1][0] == "DEBUG" and " /health 503 " in lines.last


@pytest.mark.parametrize(
    "path",
    [
        "/a\n2026-01-01 00:00:00 INFO forged",
        "/a b=c",
        "/a\x1b[2J\x9b\x7f\u2028\u202e",
        "/é\ud800",
        "/" + "x" * 5_000,
        '/"',
    ],
)
def test_a_path_forges_nothing(path: str, lines: Lines) -> None:
    app = RequestLog(Guard(App(None).starlette(), None, LOOPBACK_NAMES))  # type: ignore[arg-type]
    scope_of = {"type": "http", "method": "GET", "path": path, "query_string": b"key=s3cret", "headers": []}

    async def main() -> None:
        async def send(message: Any) -> None:
            pass

        await app({**scope_of, "client": ("10.0.0.1\n", 5)}, None, send)  # type: ignore[arg-type]

    asyncio.run(main())
    (told,) = lines.told
    assert told[1].isascii() and told[1].isprintable() and "s3cret" not in told[1] and len(told[1]) < 1_500
    assert re.match(r'"10\.0\.0\.1\\n" GET /\S+ 403 total_s=', told[1]), told


def test_an_answer_that_fails_in_its_stream_says_why(tmp_path: Path, lines: Lines) -> None:
    server = InProcessServer(tmp_path)
    step, count = server.supervisor.engine.step, [0]

    def failing() -> Any:
        count[0] += 1
        return step() if count[0] < 4 else [Failure(0, 503, "the engine died during this answer")]

    server.supervisor.engine.step = failing  # type: ignore[method-assign]
    body = endless(server) | {"max_tokens": 50, "stream": True}
    assert server.post(CHAT, body).status_code == 200
    assert lines.told[-1][0] == "ERROR" and " 200 " in lines.last
    assert facts(lines.last)["error"] == "the engine died during this answer"
    count[0] = 0
    assert server.post(CHAT, body | {"stream": False}).status_code == 503
    assert lines.told[-1][0] == "ERROR" and " 503 " in lines.last


@pytest.mark.parametrize(("stream", "status"), [(True, 200), (False, 499)])
def test_an_answer_whose_client_leaves_is_cancelled(
    stream: bool, status: int, logged: InProcessServer, lines: Lines
) -> None:
    body = json.dumps(endless(logged) | {"max_tokens": 5_000, "stream": stream}).encode()

    async def main() -> None:
        logged.supervisor._turn = None
        began = asyncio.Event()
        received = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if received:
                return received.pop()
            await (began.wait() if stream else asyncio.sleep(0.05))
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            began.set()

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": headers}
        await logged.app(scope, receive, send)

    asyncio.run(main())
    (told,) = lines.told
    assert told[0] == "INFO" and f" {status} " in told[1] and facts(told[1])["finish"] == "cancelled"
    assert facts(told[1])["prompt_tokens"].isdigit() and "error" not in facts(told[1])


def test_a_tools_name_is_logged_and_neither_its_arguments_nor_its_result(lines: Lines) -> None:
    def tell(text: str) -> str:
        """Tells."""
        return f"{text} told"

    app = RequestLog(Guard(App(None, ServerTools(Toolbox([tell]))).starlette(), None, LOOPBACK_NAMES))  # type: ignore[arg-type]
    for arguments, failed in (({"text": SECRET}, False), ({"other": SECRET}, True)):
        body = json.dumps({"name": "tell", "arguments": arguments}).encode()
        assert asyncio.run(ask(app, "POST", "/tools/call", None, (body,)))[0] == 200
        assert facts(lines.last)["tool"] == "tell" and ("tool_failed=yes" in lines.last) == failed
    body = json.dumps({"name": "no\nsuch", "arguments": {}}).encode()
    assert asyncio.run(ask(app, "POST", "/tools/call", None, (body,)))[0] == 404
    assert lines.last.isprintable() and not any(SECRET in line for _, line in lines.told)


def test_a_defect_is_logged_with_its_line(lines: Lines) -> None:
    app = RequestLog(Guard(App(None).starlette(), None, LOOPBACK_NAMES))  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        asyncio.run(ask(app, "GET", "/v1/models"))
    assert lines.told[-1][0] == "ERROR" and " /v1/models 500 " in lines.last and "AttributeError" in lines.last


def test_a_connection_that_sends_no_http_has_a_line_too(lines: Lines) -> None:
    write_refusal(("127.0.0.1", 5), WireError(400, "Invalid HTTP request received."))
    assert lines.told == [("WARNING", '127.0.0.1 - - 400 error="Invalid HTTP request received."')]

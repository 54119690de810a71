"""The server's own tools: who may use them, calls of every kind, and limits of number, time and size."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.checkpoint import load_tokenizer_and_format
from phi4_mlx.errors import RequestError
from phi4_mlx.server import tools as server_tools
from phi4_mlx.server.app import App
from phi4_mlx.server.guard import LOOPBACK_NAMES, Guard
from phi4_mlx.server.limits import TOOL_BODY_BYTES, TOOL_CALLS_LIMIT
from phi4_mlx.server.tools import ServerTools, check_room, opened_toolbox, tool_tokens
from phi4_mlx.tools.toolbox import MAX_ERROR_CHARS, MAX_RESULT_CHARS, Toolbox
from tests.conftest import ROOT
from tests.unit.server.test_guard import ask

PAGE = {"host": "localhost:8080", "origin": "http://localhost:8080", "sec-fetch-site": "same-origin"}


class Gate:
    """A tool that runs until it is let go; counts its calls."""

    def __init__(self) -> None:
        self.calls, self._open = 0, threading.Event()

    def wait(self) -> str:
        """Waits."""
        self.calls += 1
        self._open.wait(60)
        return "done"

    def let_go(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.let_go()


def serving(*functions: Any, key: str | None = None, origins: tuple[str, ...] = ()) -> Guard:
    app = App(None, ServerTools(Toolbox(functions)))  # type: ignore[arg-type]
    return Guard(app.starlette(), key, LOOPBACK_NAMES, origins)


async def post(app: Guard, name: Any, arguments: Any = None, **headers: str) -> tuple[int, Any]:
    body = json.dumps({"name": name, "arguments": {} if arguments is None else arguments}).encode()
    code, _, answer = await ask(app, "POST", "/tools/call", PAGE | headers, (body,))
    return code, json.loads(answer)


def call(app: Guard, name: Any, arguments: Any = None, **headers: str) -> tuple[int, Any]:
    return asyncio.run(post(app, name, arguments, **headers))


def add(a: int, b: int = 1) -> int:
    """Adds."""
    return a + b


def test_tools_are_listed_in_openais_form() -> None:
    code, _, body = asyncio.run(ask(serving(add), "GET", "/tools", PAGE))
    (tool,) = json.loads(body)["data"]
    assert code == 200 and tool["type"] == "function" and tool["function"]["name"] == "add"
    assert tool["function"]["description"] == "Adds." and tool["function"]["parameters"]["required"] == ["a"]
    assert json.loads(asyncio.run(ask(serving(), "GET", "/tools", PAGE))[2]) == {"data": []}


def test_a_call_is_run_and_its_result_is_text() -> None:
    assert call(serving(add), "add", {"a": 2}) == (200, {"content": "3", "is_error": False})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "add needs the argument 'a'"),
        ({"a": "two"}, "the argument 'a' of add must be of type integer"),
        ({"a": 1, "c\x1b[31m": 2}, "the argument 'c"),
        ({"a": None}, "must be of type integer"),
        ({"a": [[[]]] * 3}, "must be of type integer"),
    ],
)
def test_arguments_against_the_schema_are_an_error_for_the_model(arguments: Any, complaint: str) -> None:
    code, answer = call(serving(add), "add", arguments)
    assert code == 200 and answer["is_error"] and answer["content"].startswith("error: ")
    assert complaint in answer["content"] and "\n" not in answer["content"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"name": "add", "arguments": "{}"}', 400),
        (b'{"name": "add", "arguments": [1]}', 400),
        (b'{"name": 3, "arguments": {}}', 400),
        (b'{"arguments": {}}', 400),
        (b'{"name": "", "arguments": {}}', 400),
        (b'{"name": "' + b"x" * 300 + b'", "arguments": {}}', 400),
        (b'{"name": "sub", "arguments": {}}', 404),
        (b'{"name": "__class__", "arguments": {}}', 404),
        (b'{"name": "add", "arguments": {"a": NaN}}', 400),
        (b'{"name": "add", "arguments": {"a": 1e999}}', 400),
        (b'{"name": "add", "arguments": {"a": ' + b"9" * 5000 + b"}}", 400),
        (b'{"name": "add", "arguments": {"a": "\\ud800"}}', 400),
        (b'{"name": "add", "arguments": {"a": ' + b"[" * 300 + b"]" * 300 + b"}}", 400),
        (b'{"name": "add", "arguments": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", 400),
        (b'{"name": "add", "arguments": {"a": "' + b"x" * TOOL_BODY_BYTES + b'"}}', 413),
        (b'{"name": "add", "arguments": {"a": "' + b"x" * (TOOL_BODY_BYTES - 100) + b'"}}', 200),  # an error of types
    ],
)
def test_a_malformed_call_is_refused(body: bytes, status: int) -> None:
    code, _, answer = asyncio.run(ask(serving(add), "POST", "/tools/call", PAGE, (body,)))
    assert code == status and len(answer) < 1_000
    assert status == 200 or json.loads(answer)["error"]["message"]


def test_a_call_without_tools_says_where_they_come_from() -> None:
    code, answer = call(serving(), "add")
    assert code == 404 and "--tools" in answer["error"]["message"]


def raises() -> str:
    """Raises."""
    raise ValueError("no\nluck " + "x" * 10_000)


def leaves() -> None:
    """Leaves."""
    sys.exit(3)


def interrupts() -> None:
    """Interrupts."""
    raise KeyboardInterrupt


def binary() -> bytes:
    """Returns bytes."""
    return b"\x00\xff"


def odd() -> object:
    """Returns an object."""
    return object()


def cycle() -> list[Any]:
    """Returns a list that contains itself."""
    found: list[Any] = []
    found.append(found)
    return found


def huge() -> str:
    """Returns much."""
    return "é" * 30_000_000


def half() -> str:
    """Returns half a surrogate pair."""
    return "a\ud800b"


def nothing() -> None:
    """Returns nothing."""


def prints() -> dict[str, int]:
    """Prints."""
    print("printed\x1b[31m")
    return {"a": 1}


@pytest.mark.parametrize(
    ("function", "is_error", "content"),
    [
        (raises, True, "error: ValueError: no luck xxx"),
        (leaves, True, "error: SystemExit: 3"),
        (interrupts, True, "error: KeyboardInterrupt"),
        (binary, True, "error: TypeError: "),
        (odd, True, "error: TypeError: "),
        (cycle, True, "error: "),
        (huge, False, "éé"),
        (half, False, "a?b"),
        (nothing, False, "null"),
        (prints, False, '{"a": 1}'),
    ],
)
def test_every_kind_of_tool_ends_as_text(function: Callable[[], Any], is_error: bool, content: str) -> None:
    code, answer = call(serving(function), function.__name__)
    assert code == 200 and answer["is_error"] is is_error and answer["content"].startswith(content)
    assert len(answer["content"]) < (MAX_ERROR_CHARS if is_error else MAX_RESULT_CHARS) + 100


# -- who may use them --------------------------------------------------------------------------------------------------

FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "https://friend.example"},  # even one that may talk to the model
    {"origin": "http://localhost:8081"},
    {"origin": "http://localhost"},
    {"origin": "null"},
    {"origin": "http://localhost:8080@evil.example"},
    {"origin": "", "sec-fetch-site": "cross-site"},
    {"origin": "", "sec-fetch-site": "same-site"},  # another port of this machine
    {"origin": "", "sec-fetch-site": "anything"},
    {"sec-fetch-site": "cross-site"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("origins", [(), ("https://friend.example", "null"), ("*",)])
@pytest.mark.parametrize(("method", "path"), [
    ("GET", "/tools"), ("HEAD", "/tools"), ("POST", "/tools/call"), ("POST", "//tools/call/"), ("GET", "/tools/"),
])  # fmt: skip
def test_no_other_page_may_use_the_tools(
    method: str, path: str, origins: tuple[str, ...], headers: dict[str, str]
) -> None:
    ran: list[int] = []

    def act() -> None:
        """Acts."""
        ran.append(1)

    app = serving(act, origins=origins)
    body = (b'{"name": "act", "arguments": {}}',)
    code, _, answer = asyncio.run(ask(app, method, path, PAGE | headers, body))
    assert code == 403 and b"act" not in answer.replace(b"act on", b"") and ran == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "", "sec-fetch-site": ""},  # a program
        {"origin": "", "sec-fetch-site": "none"},  # typed into the address bar
        {"origin": "HTTP://LOCALHOST:8080"},
        {"host": "127.0.0.1", "origin": "http://127.0.0.1"},
    ],
)
@pytest.mark.parametrize("origins", [(), ("*",)])
def test_the_own_page_and_programs_may(origins: tuple[str, ...], headers: dict[str, str]) -> None:
    app = serving(add, origins=origins)
    assert call(app, "add", {"a": 1}, **headers)[0] == 200
    assert asyncio.run(ask(app, "GET", "/tools", PAGE | headers))[0] == 200


def test_a_second_origin_cannot_hide_the_first() -> None:
    for raw in ([(b"origin", b"http://localhost:8080")], [(b"origin", b"https://evil.example")]):
        headers = PAGE | {"origin": "https://evil.example" if b"localhost" in raw[0][1] else PAGE["origin"]}
        assert asyncio.run(ask(serving(add, origins=("*",)), "GET", "/tools", headers, raw=raw))[0] == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_call_must_say_that_it_is_json(kind: str) -> None:
    assert call(serving(add), "add", {"a": 1}, **{"content-type": kind})[0] == 415


def test_the_tools_need_the_key() -> None:
    app = serving(add, key="s3cret")
    assert call(app, "add", {"a": 1})[0] == 401 and asyncio.run(ask(app, "GET", "/tools", PAGE))[0] == 401
    assert call(app, "add", {"a": 1}, authorization="Bearer s3cret")[0] == 200


# -- limits ------------------------------------------------------------------------------------------------------------


def test_calls_at_a_time_are_limited_and_nothing_else_waits(gate: Gate) -> None:
    async def main() -> None:
        app = serving(gate.wait, add)
        waiting = [asyncio.create_task(post(app, "wait")) for _ in range(TOOL_CALLS_LIMIT)]
        while gate.calls < TOOL_CALLS_LIMIT:
            await asyncio.sleep(0.01)
        code, answer = await post(app, "add", {"a": 1})
        assert code == 429 and str(TOOL_CALLS_LIMIT) in answer["error"]["message"]
        assert (await ask(app, "GET", "/tools", PAGE))[0] == 200
        gate.let_go()
        done = await asyncio.gather(*waiting)
        assert done == [(200, {"content": "done", "is_error": False})] * TOOL_CALLS_LIMIT
        assert (await post(app, "add", {"a": 1}))[0] == 200

    asyncio.run(main())


def test_a_call_that_hangs_ends_as_an_error_and_counts_until_it_ends(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_tools, "TOOL_S", 0.2)
    monkeypatch.setattr(server_tools, "TOOL_CALLS_LIMIT", 1)

    async def main() -> None:
        app = serving(gate.wait, add)
        code, answer = await post(app, "wait")
        assert code == 200 and answer["is_error"] and "wait has not answered within 0.2 s" in answer["content"]
        assert (await post(app, "add", {"a": 1}))[0] == 429
        gate.let_go()
        while (await post(app, "add", {"a": 1}))[0] == 429:
            await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_client_that_disconnects_is_not_waited_for(gate: Gate) -> None:
    async def main() -> None:
        app, sent = serving(gate.wait), list[Any]()
        body = b'{"name": "wait", "arguments": {}}'
        pairs = [(name.encode(), value.encode()) for name, value in PAGE.items()]
        pairs.append((b"content-type", b"application/json"))
        scope = {"type": "http", "method": "POST", "path": "/tools/call", "query_string": b"", "headers": pairs}
        received = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            while not received and not gate.calls:
                await asyncio.sleep(0.01)
            return received.pop() if received else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        assert sent[0]["status"] == 499 and gate.calls == 1

    asyncio.run(main())


def test_no_thread_left_is_answered_503(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        app = serving(add)
        assert (await post(app, "add", {"a": 1}))[0] == 200  # and asyncio's own threads run
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            assert (await post(app, "add", {"a": 1}))[0] == 503
        assert (await post(app, "add", {"a": 1}))[0] == 200

    asyncio.run(main())


# -- at the start ------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, *files: str, chat_format: str | None = None, mcp: list[str] | None = None) -> str:
    """The line with which these tools are refused."""
    names = []
    for number, source in enumerate(files):
        (tmp_path / f"{number}.py").write_text(source)
        names.append(str(tmp_path / f"{number}.py"))
    tokenizer = load_tokenizer_and_format(ROOT / "phi4_mlx" / "demo", chat_format)
    names = names or [str(tmp_path / "nowhere.py")]
    with pytest.raises(RequestError) as error, opened_toolbox(names, mcp or [], tokenizer, pytest.fail):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


ADD = 'def add(a: int) -> int:\n    """Adds."""\n    return a\n'


def test_tools_that_cannot_be_used_are_one_line_at_the_start(tmp_path: Path) -> None:
    assert "nowhere.py cannot be read" in refused(tmp_path)
    assert "two tools are called 'add'" in refused(tmp_path, ADD, ADD)
    assert "line 1: SyntaxError" in refused(tmp_path, "def")
    assert "line 2: SystemExit: 3" in refused(tmp_path, "import sys\nsys.exit(3)")
    assert "defines no function" in refused(tmp_path, "x = 1")
    assert "does not support tools" in refused(tmp_path, ADD, chat_format="phi3.5-mini")
    assert "is empty" in refused(tmp_path, ADD, mcp=[" "])
    assert "must not be 'auto'" in refused(tmp_path, ADD.replace("add", "auto"))


def test_tools_must_leave_room_in_the_context() -> None:
    tokenizer = load_tokenizer_and_format(ROOT / "phi4_mlx" / "demo")
    toolbox = Toolbox([add])
    tokens = tool_tokens(toolbox, tokenizer)
    assert 10 < tokens < 200 and tool_tokens(Toolbox(), tokenizer) == 0
    check_room(toolbox, tokenizer, tokens + 1)
    with pytest.raises(RequestError, match=f"take {tokens} tokens of each prompt, and the context has {tokens}"):
        check_room(toolbox, tokenizer, tokens)

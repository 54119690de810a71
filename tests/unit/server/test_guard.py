"""The guard: hosts, origins, keys, and limits on the size and the time of a request."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Iterable, MutableMapping
from typing import Any

import pytest
from starlette.routing import Route

from phi4_mlx.server import guard as guard_module
from phi4_mlx.server.app import App
from phi4_mlx.server.guard import LOOPBACK_NAMES, Guard, is_loopback
from phi4_mlx.server.limits import BODIES, BODY_BYTES, HEADER_BYTES, SMALL_BODY_BYTES, WRITE_BYTES

Headers = dict[str, str]


class Inner:
    """The application behind the guard; keeps the bodies that reached it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"through"})


async def ask(
    app: Any,
    method: str = "POST",
    path: str = "/v1/chat/completions",
    headers: Headers | None = None,
    body: Iterable[bytes] | AsyncIterator[bytes] = (b"{}",),
    raw: Iterable[tuple[bytes, bytes]] = (),
) -> tuple[int, Headers, bytes]:
    given = {"host": "localhost", "content-type": "application/json"} | (headers or {})
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in given.items() if value] + list(raw)
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": pairs,
    }
    parts = body if isinstance(body, AsyncIterator) else aiter_of(body)

    ended = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal ended
        if ended:  # the client waits for its answer
            await asyncio.Event().wait()
        try:
            return {"type": "http.request", "body": await anext(parts), "more_body": True}
        except StopAsyncIteration:
            ended = True
            return {"type": "http.request", "body": b"", "more_body": False}

    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    answer = {name.decode(): value.decode("latin-1") for name, value in sent[0]["headers"]}
    return sent[0]["status"], answer, b"".join(message["body"] for message in sent[1:])


async def aiter_of(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def status(app: Any, **request: Any) -> int:
    return asyncio.run(ask(app, **request))[0]


def guarded(
    key: str | None = None, hosts: tuple[str, ...] | None = LOOPBACK_NAMES, origins: tuple[str, ...] = ()
) -> Guard:
    return Guard(Inner(), key, hosts, origins)


@pytest.mark.parametrize("port", ["", ":8080"])
@pytest.mark.parametrize(
    ("host", "through"),
    [
        ("localhost", True),
        ("LocalHost", True),
        ("127.0.0.1", True),
        ("[::1]", True),
        ("evil.example", False),  # its owner can point it at 127.0.0.1
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example:80@localhost", False),
        ("localhost:80:", False),
        ("0.0.0.0", False),
        ("127.1", False),
        ("\xff", False),
    ],
)
def test_only_its_own_names_are_accepted(host: str, port: str, through: bool) -> None:
    assert status(guarded(), headers={"host": host + port}) == (200 if through else 403)


def test_a_request_without_a_host_is_refused() -> None:
    assert status(guarded(), headers={"host": ""}) == 403
    assert status(guarded(hosts=None), headers={"host": "any.example"}) == 200


def test_a_refused_host_is_told_each_name_once() -> None:
    refused = asyncio.run(ask(guarded(hosts=(*LOOPBACK_NAMES, "127.0.0.1")), headers={"host": "evil.example"}))[2]
    assert refused.count(b"127.0.0.1") == 1


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    ("origin", "through"),
    [
        ("http://localhost:8080", True),  # the server's own page
        ("HTTP://LOCALHOST:8080", True),
        ("http://localhost:8081", False),  # another server on this machine
        ("http://localhost", False),
        ("https://evil.example", False),
        ("http://evil.example/localhost:8080", False),
        ("http://localhost:8080@evil.example", False),
        ("null", False),  # a sandboxed frame, a file
        ("http://[", False),
        ("http://\xbd\u00e9\u2100".encode("latin-1", "ignore").decode("latin-1"), False),
        ("\xff", False),
        ("https://friend.example", True),
        ("https://friend.example.evil.example", False),
        ("https://FRIEND.example", False),
    ],
)
def test_pages_of_other_origins_are_refused(method: str, origin: str, through: bool) -> None:
    app = guarded(origins=("https://friend.example",))
    code, headers, _ = asyncio.run(ask(app, method, headers={"host": "localhost:8080", "origin": origin}))
    assert code == (403 if not through else 204 if method == "OPTIONS" else 200)
    assert headers.get("access-control-allow-origin") == (
        "https://friend.example" if "friend" in origin and through else None
    )


def test_a_missing_host_matches_no_origin() -> None:
    assert status(guarded(hosts=None), headers={"host": "", "origin": "null"}) == 403


def test_a_preflight_needs_no_key_and_lists_the_headers() -> None:
    app = guarded(key="k", origins=("*",))
    code, headers, _ = asyncio.run(ask(app, "OPTIONS", headers={"origin": "https://any.example"}))
    assert code == 204 and headers["access-control-allow-origin"] == "https://any.example"
    assert headers["access-control-allow-methods"] == "GET, POST" and headers["vary"] == "Origin"
    assert {"authorization", "*"} == set(headers["access-control-allow-headers"].split(", "))
    # The page can read a refusal too.
    code, headers, _ = asyncio.run(ask(app, headers={"origin": "https://any.example"}))
    assert code == 401 and headers["access-control-allow-origin"] == "https://any.example"
    assert status(app, method="OPTIONS") == 401  # a page always sends its origin


def routes() -> list[tuple[str, str]]:
    found = []
    for route in App(None).starlette().routes:  # type: ignore[arg-type]
        assert isinstance(route, Route)
        for method in sorted(route.methods or ()):
            found.append((method, route.path.replace("{model:path}", "demo")))
    return found


def is_open(method: str, path: str) -> bool:
    return method in ("GET", "HEAD") and (path in ("/", "/health") or path.startswith("/page/"))


CLOSED = [
    ("GET", "/nowhere"), ("POST", "/health"), ("POST", "/health/"), ("DELETE", "/"), ("POST", "/"), ("POST", "/page/x"),
    ("GET", "/page"), ("GET", "/pages/x"), ("GET", "//page/x"), ("GET", "/v1/page/x"), ("GET", "/PAGE/x"),
    ("GET", "//"), ("GET", "/health/"), ("OPTIONS", "/page/x"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), [*routes(), *CLOSED])
def test_every_route_but_health_and_the_page_needs_the_key(method: str, path: str) -> None:
    app = guarded(key="s3cret")
    code, headers, body = asyncio.run(ask(app, method, path))
    if is_open(method, path):
        assert code == 200
        return
    assert code == 401 and headers["www-authenticate"] == "Bearer" and (method, path) not in OPEN
    error = json.loads(body)
    assert (error["error"]["type"] == "authentication_error") and ("type" in error) == path.startswith("/v1/messages")
    assert not app.app.bodies  # type: ignore[attr-defined]


OPEN = [("GET", "/"), ("HEAD", "/"), ("GET", "/page/chat.js"), ("HEAD", "/page/chat.css"), ("GET", "/health")]


@pytest.mark.parametrize(("method", "path"), OPEN)
def test_the_page_needs_no_key_but_an_accepted_host_and_origin(method: str, path: str) -> None:
    """A browser asks for a Basic password before it shows anything; the page itself asks better."""
    app = guarded(key="s3cret")
    assert status(app, method=method, path=path) == 200
    assert status(app, method=method, path=path, headers={"host": "evil.example"}) == 403
    assert status(app, method=method, path=path, headers={"origin": "https://evil.example"}) == 403


@pytest.mark.parametrize(
    ("headers", "through"),
    [
        ({"authorization": "Bearer s3cret"}, True),
        ({"authorization": "bearer  s3cret "}, True),
        ({"x-api-key": "s3cret"}, True),
        ({"authorization": "Bearer not", "x-api-key": "s3cret"}, True),
        ({}, False),
        ({"authorization": "s3cret"}, False),
        ({"authorization": "Bearer"}, False),
        ({"authorization": "Bearer s3cre"}, False),
        ({"authorization": "Bearer s3cret1"}, False),
        ({"authorization": "Bearer S3CRET"}, False),
        ({"authorization": "Bearer \xff\xfe"}, False),
        ({"authorization": "Basic bWU6czNjcmV0"}, False),  # me:s3cret
        ({"authorization": "Basic s3cret"}, False),
        ({"x-api-key": "\xff"}, False),
    ],
)
def test_the_key_has_two_forms_and_must_match_exactly(headers: Headers, through: bool) -> None:
    assert status(guarded(key="s3cret"), headers=headers) == (200 if through else 401)


def test_a_key_may_hold_any_letters() -> None:
    app = guarded(key="ключ")
    assert status(app, raw=[(b"authorization", b"Bearer " + "ключ".encode())]) == 200
    assert status(app, raw=[(b"x-api-key", "ключ".encode())]) == 200


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, compare = [], hmac.compare_digest

    def counting(given: bytes, wanted: bytes) -> bool:
        compared.append((given, wanted))
        return compare(given, wanted)

    monkeypatch.setattr(guard_module.hmac, "compare_digest", counting)
    for headers in ({"x-api-key": "wrong", "authorization": "Bearer s3cret"}, {"x-api-key": "s3cret"}, {}):
        status(guarded(key="s3cret"), headers=headers)
    assert [given for given, _ in compared] == [b"wrong", b"s3cret", b"s3cret", b""]
    assert all(wanted == b"s3cret" for _, wanted in compared)


@pytest.mark.parametrize(
    ("kind", "through"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("text/plain", False),  # a page of any origin can send it without a preflight
        ("application/x-www-form-urlencoded", False),
        ("multipart/form-data", False),
        ("application/json-not", False),
        ("text/plain; application/json", False),
        ("", False),
    ],
)
def test_a_body_must_say_that_it_is_json(kind: str, through: bool) -> None:
    assert status(guarded(), headers={"content-type": kind}) == (200 if through else 415)
    assert status(guarded(), method="GET", headers={"content-type": kind}) == 200


class Parts:
    """A body in parts, as from a socket; counts the parts that were read."""

    def __init__(self, count: float, size: int = 2**20, pause_s: float = 0.0) -> None:
        self.count, self.part, self.pause_s, self.read = count, b"x" * size, pause_s, 0

    def __aiter__(self) -> Parts:
        return self

    async def __anext__(self) -> bytes:
        await asyncio.sleep(self.pause_s)
        if self.read >= self.count:
            raise StopAsyncIteration
        self.read += 1
        return self.part


def test_a_body_is_read_up_to_its_limit_and_no_further() -> None:
    app, limit = guarded(), BODY_BYTES // 2**20
    assert limit == 16
    assert status(app, body=Parts(limit)) == 200 and len(app.app.bodies[0]) == BODY_BYTES  # type: ignore[attr-defined]
    endless = Parts(float("inf"))
    code, headers, body = asyncio.run(ask(app, body=endless))
    assert code == 413 and endless.read == limit + 1 and headers["connection"] == "close"
    assert str(BODY_BYTES) in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("length", ["10737418240", str(BODY_BYTES + 1), "9" * 30])
def test_a_body_that_announces_too_much_is_not_read(length: str) -> None:
    parts = Parts(1)
    assert status(guarded(), headers={"content-length": length}, body=parts) == 413 and parts.read == 0


def test_a_slow_body_is_answered_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "REQUEST_S", 0.1)
    parts = Parts(float("inf"), size=1, pause_s=0.03)
    code, headers, _ = asyncio.run(ask(guarded(), body=parts))
    assert code == 408 and headers["connection"] == "close" and parts.read < 10


def test_an_incomplete_body_does_not_reach_the_application() -> None:
    app = guarded()

    async def main() -> list[int]:
        sent: list[int] = []
        messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message.get("status"))

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        await app({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, send)
        return sent

    assert asyncio.run(main())[0] == 400 and not app.app.bodies  # type: ignore[attr-defined]


def test_headers_have_a_limit_however_fast_they_come() -> None:
    assert status(guarded(), headers={"x-a": "y" * (HEADER_BYTES - 200)}) == 200
    assert status(guarded(), headers={"x-a": "y" * HEADER_BYTES}) == 431
    assert status(guarded(), raw=[(b"x-%d" % n, b"") for n in range(HEADER_BYTES // 4)]) == 431
    assert status(guarded(), path="/" + "y" * HEADER_BYTES) == 431


def test_the_application_still_receives_the_disconnect() -> None:
    heard = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.extend([await receive(), await receive()])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def main() -> None:
        messages = [{"type": "http.request", "body": b"{}", "more_body": False}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            pass

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        await Guard(app, None, LOOPBACK_NAMES)(scope, receive, send)

    asyncio.run(main())
    assert [message["type"] for message in heard] == ["http.request", "http.disconnect"] and heard[0]["body"] == b"{}"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((host, True) for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]")),
        *((host, False) for host in ("0.0.0.0", "::", "192.168.0.1", "example.com", "localhost.example", "", "127.1")),
    ],
)
def test_loopback_addresses(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_only_asking_for_the_health_needs_no_key() -> None:
    app, parts = guarded(key="k"), Parts(3)
    assert status(app, method="GET", path="/health") == 200
    code, headers, _ = asyncio.run(ask(app, "POST", "/health", body=parts))
    assert code == 401 and parts.read == 0 and "connection" not in headers
    for length in ({"content-length": "10000000"}, {"expect": "100-continue"}, {"transfer-encoding": "chunked"}):
        code, headers, _ = asyncio.run(ask(app, "POST", "/health", headers=length, body=parts))
        assert code == 401 and parts.read == 0 and headers["connection"] == "close"


@pytest.mark.parametrize("end", ["disconnect", "time"])
def test_all_bodies_together_have_a_limit(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "REQUEST_S", 0.5 if end == "time" else 60.0)
    app, chunk = guarded(), b"x" * 2**20
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]

    async def main() -> None:
        hold = asyncio.Event()
        statuses: list[int] = []

        async def unfinished(chunks: int) -> None:
            left = chunks

            async def receive() -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    await hold.wait()
                    return {"type": "http.disconnect"}
                return {"type": "http.request", "body": chunk, "more_body": True}

            async def send(message: Any) -> None:
                statuses.extend([message["status"]] if "status" in message else [])

            await app({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, send)

        sending = [asyncio.create_task(unfinished(8)) for _ in range(20)]
        while sum(task.done() for task in sending) < 12:
            await asyncio.sleep(0.01)
        assert statuses[:12] == [503] * 12 and app.bodies.used == BODIES * BODY_BYTES == 8 * 8 * 2**20
        code, answer, _ = await ask(app, body=Parts(1))
        assert code == 503 and answer["retry-after"] == "2" and answer["connection"] == "close"
        assert (await ask(app, body=Parts(1, size=SMALL_BODY_BYTES)))[0] == 200
        if end == "disconnect":
            hold.set()
        await asyncio.gather(*sending)
        assert statuses[12:] == [400 if end == "disconnect" else 408] * 8 and app.bodies.used == 0
        assert (await ask(app, body=Parts(8)))[0] == 200 and app.bodies.used == 0

    asyncio.run(main())


@pytest.mark.parametrize("size", [0, 1, WRITE_BYTES, WRITE_BYTES + 1, 5 * WRITE_BYTES])
def test_a_large_response_is_written_in_slices(size: int) -> None:
    """A client that does not read then holds one slice, not the response."""
    given, sent = bytes(range(256)) * (size // 256) + b"x" * (size % 256), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": given})

    async def send(message: Any) -> None:
        sent.append(message)

    async def main() -> None:
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
        await Guard(app, None, LOOPBACK_NAMES)(scope, None, send)  # type: ignore[arg-type]

    asyncio.run(main())
    assert b"".join(message["body"] for message in sent[1:]) == given
    assert max(len(message["body"]) for message in sent[1:]) <= WRITE_BYTES
    more = [message.get("more_body", False) for message in sent[1:]]
    assert not more[-1] and all(more[:-1])

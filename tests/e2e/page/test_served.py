"""The page as the server itself serves it, with the demo model, in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.page.conftest import answered, ask, note
from tests.e2e.server_process import Server, answer_on, serving

TOOLS = '''
def calculate(expression: str) -> str:
    """Evaluates an arithmetic expression."""
    left, _, right = expression.partition("*")
    return str(int(left) * int(right))
'''


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tools = tmp_path_factory.mktemp("tools") / "tools.py"
    tools.write_text(TOOLS)
    with serving("--tools", str(tools)) as server:
        yield server


@pytest.fixture
def page(browser: Any, real: Server) -> Iterator[Any]:
    context = browser.new_context()
    page = context.new_page()
    page.errors, page.urls = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: note(page.errors, message))
    page.on("request", lambda request: page.urls.append(request.url))
    page.goto(real.url)
    yield page
    context.close()
    assert page.errors == []


def test_a_conversation_with_the_demo_model(page: Any, real: Server) -> None:
    page.wait_for_selector("#model-name:has-text('demo')")
    page.locator("#starters button", has_text="Say hello").click()
    answered(page)
    assert "I can greet you" in page.inner_text(".answer > .text")
    ask(page, "My name is Ada.")
    answered(page, 2)
    ask(page, "What is my name?")
    answered(page, 3)
    assert "Ada" in page.locator(".answer > .text").last.inner_text()
    assert all(url.startswith((real.url, "data:")) for url in page.urls)


def test_a_server_with_a_key_asks_for_it_on_the_page(browser: Any) -> None:
    with serving("--api-key", "schlüssel 1") as locked:
        context = browser.new_context()
        page = context.new_page()
        page.goto(locked.url)
        page.fill("#new-key", "wrong")
        page.press("#new-key", "Enter")
        page.wait_for_selector("#key-mistake:has-text('does not accept')")
        page.fill("#new-key", "schlüssel 1")
        page.press("#new-key", "Enter")
        page.locator("#starters button", has_text="Say hello").click()
        answered(page)
        assert "I can greet you" in page.inner_text(".answer > .text")
        context.close()


def test_the_demo_model_calculates_with_a_tool_of_the_server(page: Any) -> None:
    page.locator("#starters button", has_text="Calculate").click()
    page.locator(".consent").get_by_role("button", name="Run", exact=True).click()
    answered(page, 2)
    assert '"17 * 23" → 391' in page.inner_text(".call summary")
    assert "391" in page.locator(".answer > .text").last.inner_text()


@pytest.mark.parametrize(
    "path",
    [
        "/page/../page_files.py", "/page/%2e%2e/guard.py", "/page/..%2fguard.py", "/page//etc/passwd", "/page/",
        "/page", "/page/none.js", "/page/vendor/vendor.json", "/page/vendor", "/page/main.js%00",
        "/page/./../../errors.py", "/page/MAIN.JS",
    ],
)  # fmt: skip
def test_only_the_files_of_the_page_are_served(path: str, real: Server) -> None:
    with real.raw() as connection:  # a client library would tidy the path
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        reply = answer_on(connection)
    assert reply.startswith(b"HTTP/1.1 404 ") and b"import " not in reply


def test_the_head_of_a_file_has_no_body(real: Server) -> None:
    head = httpx.head(real.url + "/page/main.js")
    assert head.status_code == 200 and head.content == b"" and int(head.headers["content-length"]) > 0

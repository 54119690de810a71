"""A browser and a scripted server for the tests of the chat page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.page.scripted_server import ScriptedServer, scripted_server
from tests.e2e.server_process import until

AXE = Path(__file__).parent / "vendor" / "axe.js"

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_MS = 60_000  # whatever takes longer is stuck


# A module's, not a session's: while playwright runs, its event loop is that of the thread, and other tests need theirs.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; the tests that need it are skipped where it or playwright is missing."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        microphone = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *microphone])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def script() -> Iterator[ScriptedServer]:
    with scripted_server() as server:
        yield server


@pytest.fixture
def server(script: ScriptedServer) -> Iterator[ScriptedServer]:
    """A server that knows nothing of other tests."""
    script.reset()
    yield script
    script.release()


@pytest.fixture
def page(browser: Any, server: ScriptedServer) -> Iterator[Any]:
    """The page in a profile of its own. No script may fail, and the policy may refuse nothing."""
    context = browser.new_context()
    page = open_page(context, server)
    yield page
    context.close()
    assert page.errors == []


def open_page(context: Any, server: ScriptedServer) -> Any:
    """A tab with the page, once its models have been read; `errors` collects what went wrong in it."""
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: note(page.errors, message))
    page.set_default_timeout(WAIT_MS)
    page.goto(server.url)
    if server.key is None:
        page.wait_for_selector("#model-name:not(:empty)")
    return page


def note(errors: list[str], message: Any) -> None:
    network = "Failed to load resource" in message.text or "net::ERR" in message.text  # which tests bring about
    if message.type in ("error", "warning") and not network:
        errors.append(message.text)


def becomes_true(page: Any, condition: str) -> None:
    """Waits for a JavaScript expression; playwright's own wait needs eval, which the page's policy forbids."""
    until(lambda: page.evaluate(condition))


def axe(page: Any) -> list[str]:
    """The violations that axe-core finds on the page as it is."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text(encoding="utf-8"))
    violations = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
    return [f"{it['id']}: {node['target']} {node['failureSummary']}" for it in violations for node in it["nodes"]]


def ask(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def answered(page: Any, count: int = 1) -> None:
    """Waits until this many answers are complete."""
    page.wait_for_selector(f"body:not(.busy) .answer >> nth={count - 1}")


def grown(page: Any, text: str) -> None:
    """Waits until the last answer shows a text."""
    page.wait_for_selector(f".answer:last-child:has-text({json.dumps(text)})")

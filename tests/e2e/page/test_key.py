"""A server with a key: asked for once, checked at once, and no question is lost over it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.page.conftest import answered, ask, open_page
from tests.e2e.page.scripted_server import ScriptedServer
from tests.e2e.server_process import until


@pytest.fixture
def page(browser: Any, server: ScriptedServer) -> Iterator[Any]:
    server.key = "right"
    context = browser.new_context()
    page = open_page(context, server)
    page.wait_for_selector("#key-dialog[open]")
    yield page
    context.close()
    assert page.errors == []


def enter(page: Any, key: str) -> None:
    page.fill("#new-key", key)
    page.press("#new-key", "Enter")


def test_the_page_asks_once_and_keeps_the_key(page: Any, server: ScriptedServer) -> None:
    told = page.inner_text("#key-dialog")
    assert "PHI4_MLX_API_KEY" in told and "--api-key" in told and "kept in this browser" in told
    enter(page, " right ")
    page.wait_for_selector("#model-name:not(:empty)")
    page.reload()
    page.wait_for_selector("#model-name:not(:empty)")
    other = open_page(page.context, server)
    other.wait_for_selector("#model-name:not(:empty)")
    assert other.locator("#key-dialog").is_hidden() and page.locator("#key-dialog").is_hidden()


def test_a_wrong_key_is_named_and_the_settings_are_offered(page: Any, server: ScriptedServer) -> None:
    enter(page, "wrong")
    page.wait_for_selector("#key-mistake:has-text('does not accept this key')")
    page.get_by_role("button", name="Open the settings").click()
    assert page.locator("#settings").is_visible() and page.locator("#key-dialog").is_hidden()
    page.fill("#key", "right")
    page.keyboard.press("Enter")
    page.wait_for_selector("#model-name:not(:empty)")
    assert page.locator("#settings").is_hidden()


def test_a_question_waits_for_the_key(page: Any, server: ScriptedServer) -> None:
    page.keyboard.press("Escape")
    until(lambda: page.locator("#key-dialog").is_hidden())
    ask(page, "Are you there?")
    page.wait_for_selector("#key-dialog[open]")
    enter(page, "right")
    answered(page)
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "Are you there?"}]
    page.wait_for_selector("#model-name:not(:empty)")


def test_a_question_without_a_key_stays_and_can_be_sent_again(page: Any, server: ScriptedServer) -> None:
    page.get_by_role("button", name="Not now").click()
    ask(page, "Are you there?")
    page.wait_for_selector("#key-dialog[open]")
    page.get_by_role("button", name="Not now").click()
    page.wait_for_selector("#notice.bad:has-text('requires a key')")
    assert page.inner_text(".question .text") == "Are you there?"
    page.click("#notice-action")
    page.wait_for_selector("#key-dialog[open]")
    enter(page, "right")
    answered(page)
    assert len(server.bodies) == 1


def test_a_key_that_the_server_has_changed_is_asked_for_again(page: Any, server: ScriptedServer) -> None:
    enter(page, "right")
    page.wait_for_selector("#model-name:not(:empty)")
    server.key = "new"
    ask(page, "Are you there?")
    page.wait_for_selector("#key-dialog[open]")
    assert "does not accept the key that this browser keeps" in page.inner_text("#key-mistake")
    enter(page, "new")
    answered(page)
    page.click("#open-settings")
    assert page.input_value("#key") == "new"


def test_a_key_with_other_letters_than_a_header_takes_is_named(page: Any, server: ScriptedServer) -> None:
    enter(page, "schlüssel→")
    page.wait_for_selector("#key-mistake:not(:empty)")
    assert "key" in page.inner_text("#key-mistake") and "running" not in page.inner_text("#key-mistake")

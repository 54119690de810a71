"""The settings, the theme and the starters of the page."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.page.conftest import answered, ask
from tests.e2e.page.scripted_server import ScriptedServer, tool


def test_settings_are_sent_and_kept(page: Any, server: ScriptedServer) -> None:
    values = {"system": "Be brief.", "temperature": "0.7", "top-p": "0.9", "seed": "7", "max-tokens": "99"}
    page.click("#open-settings")
    for field, value in values.items():
        page.fill(f"#{field}", value)
    page.keyboard.press("Escape")
    page.reload()
    ask(page, "One")
    answered(page)
    body = server.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [body[it] for it in ("temperature", "top_p", "seed", "max_tokens")] == [0.7, 0.9, 7, 99]
    page.click("#open-settings")
    assert {field: page.input_value(f"#{field}") for field in values} == values


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("temperature", "2.1"), ("temperature", "hot"), ("top-p", "0"), ("seed", "1.5"), ("max-tokens", "0")],
)
def test_a_wrong_number_is_named_and_not_sent(field: str, wrong: str, page: Any, server: ScriptedServer) -> None:
    page.click("#open-settings")
    page.fill(f"#{field}", wrong)
    note = page.inner_text(f"#{field}-note")
    assert wrong in note and "from" in note and page.get_attribute(f"#{field}", "aria-invalid") == "true"
    page.keyboard.press("Escape")
    ask(page, "One")
    answered(page)
    assert server.bodies[0].get(field.replace("-", "_")) in (None, 0)
    page.click("#open-settings")
    page.fill(f"#{field}", "1")
    assert page.get_attribute(f"#{field}", "aria-invalid") == "false" and wrong not in page.inner_text(f"#{field}-note")


@pytest.mark.parametrize("stored", ['{"tools": "[]", "temperature": 1, "system": null}', "[]", "null", "{", "7"])
def test_settings_of_an_older_page_do_no_harm(stored: str, page: Any, server: ScriptedServer) -> None:
    server.tools = [tool("look")]
    page.evaluate("it => localStorage['phi4_mlx.settings'] = it", stored)
    page.reload()
    page.wait_for_selector("#tools-on")
    ask(page, "One")
    answered(page)
    assert "tools" not in server.bodies[0] and server.bodies[0]["temperature"] == 0
    assert len(server.bodies[0]["messages"]) == 1


def test_the_theme_follows_the_system_until_the_user_chooses(page: Any) -> None:
    def paper() -> str:
        return str(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))

    light = paper()
    page.emulate_media(color_scheme="dark")
    dark = paper()
    assert light != dark
    page.click("#theme")
    assert paper() == light
    page.reload()
    assert paper() == light
    page.click("#theme")
    page.emulate_media(color_scheme="light")
    assert paper() == light  # equal to the system's again, so it is followed


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("demo", "Say hello"),
        ("demo-reasoning", "Multiply"),
        ("instruct", "Write code"),
        ("reasoning", "Prove"),
        ("base", "Go on with a sentence"),
    ],
)
def test_starters_fit_the_model(kind: str, title: str, page: Any, server: ScriptedServer) -> None:
    server.kind = kind
    page.reload()
    page.wait_for_selector(f"#starters button:has-text('{title}')")
    page.locator("#starters button").first.click()
    answered(page)
    assert server.bodies[0]["messages"][0]["role"] == "user"


def test_a_starter_with_a_tool_needs_it_and_switches_it_on(page: Any, server: ScriptedServer) -> None:
    server.kind = "demo"
    page.reload()
    page.wait_for_selector("#starters button")
    assert "Calculate" not in page.inner_text("#starters")
    server.tools = [tool("calculate")]
    page.reload()
    page.locator("#starters button", has_text="Calculate").click()
    answered(page)
    assert server.bodies[0]["tools"] == server.tools


@pytest.mark.parametrize(("kind", "sent"), [("instruct", 0), ("reasoning", None)])
def test_a_reasoning_model_is_sampled_as_its_server_knows(
    kind: str, sent: int | None, page: Any, server: ScriptedServer
) -> None:
    server.kind = kind
    page.reload()
    page.wait_for_selector("#model-name:text(\"scripted\")", state="attached")
    ask(page, "One")
    answered(page)
    page.click("#open-settings")
    page.fill("#temperature", "0")
    page.keyboard.press("Escape")
    ask(page, "Two")
    answered(page, 2)
    assert [body.get("temperature") for body in server.bodies] == [sent, 0]

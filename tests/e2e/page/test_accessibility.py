"""axe-core over all views of the page, in light and dark, on a phone and on a narrow screen; and the keyboard alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.page.conftest import answered, ask, axe, grown, open_page
from tests.e2e.page.scripted_server import WAIT, ScriptedServer, call, tool

SCREENS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1200, "height": 800}},
    "dark": {"viewport": {"width": 1200, "height": 800}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    "narrow": {"viewport": {"width": 320, "height": 568}, "color_scheme": "dark", "reduced_motion": "reduce"},
}
EVERYTHING = r"""### A heading of the third level

Some *text* with `code`, a [link](https://example.org) and $x^2$.

| city | people |
|---|---:|
| Oslo | 717,710 |
| A town with a very long name indeed, which needs its space | 10,092,000 |

```python
def merge(a, b):  # a line that is longer than a narrow screen is wide, so that it can be scrolled
    return sorted(a + b)
```

- [x] done
- one
  1. nested

$$\int_0^1 x\,dx = \frac{1}{2}$$

> A quote.

# A heading of the first level
"""
View = Callable[[Any, ScriptedServer], None]


def empty(page: Any, server: ScriptedServer) -> None:
    page.wait_for_selector("#starters button")


def conversation(page: Any, server: ScriptedServer) -> None:
    server.answers = [["<think>Let me see.</think>", EVERYTHING]]
    server.headers = {"x-phi4-ignored": "model"}
    ask(page, "Show me everything.")
    answered(page)
    page.click(".thought summary")
    page.wait_for_timeout(500)  # libraries are read, and what they draw appears


def streaming(page: Any, server: ScriptedServer) -> None:
    server.answers = [["Some **text**", WAIT]]
    ask(page, "Begin.")
    grown(page, "Some text")
    ask(page, "This question waits.")


def thinking(page: Any, server: ScriptedServer) -> None:
    server.answers = [["<think>Hm", WAIT]]
    ask(page, "Begin.")
    page.wait_for_selector(".thought.growing")


def consent(page: Any, server: ScriptedServer) -> None:
    page.click("#tools-on")  # stays on
    server.answers = [[call("look", where="here")]]
    ask(page, "Where?")
    page.wait_for_selector(".consent:visible")


def failed_call(page: Any, server: ScriptedServer) -> None:
    server.answers = [[call("fail")]]
    ask(page, "Where?")
    page.locator(".consent").get_by_role("button", name="Run", exact=True).click()
    answered(page, 2)
    page.locator(".call summary").click()


def problem(page: Any, server: ScriptedServer) -> None:
    page.context.set_offline(True)
    ask(page, "Are you there?")
    page.wait_for_selector("#notice.bad")


def editing(page: Any, server: ScriptedServer) -> None:
    ask(page, "One")
    answered(page)
    page.locator(".question").hover()
    page.get_by_role("button", name="Edit and send again").click()


def settings(page: Any, server: ScriptedServer) -> None:
    page.click("#open-settings")
    page.fill("#temperature", "3")


def listed(page: Any, server: ScriptedServer) -> None:
    if page.locator("#sidebar").is_hidden():
        page.click("#sidebar-toggle")
    page.locator("#sidebar .open").first.hover()
    page.locator("#sidebar .more").first.click()


def key(page: Any, server: ScriptedServer) -> None:
    server.key = "right"
    page.reload()
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#new-key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-mistake:not(:empty)")


VIEWS: list[View] = [
    empty, conversation, streaming, thinking, consent, failed_call, problem, editing, settings, listed, key
]  # fmt: skip


@pytest.mark.parametrize("screen", SCREENS)
def test_no_view_has_a_violation(screen: str, browser: Any, server: ScriptedServer) -> None:
    server.tools = [tool("look"), tool("fail")]
    context = browser.new_context(**SCREENS[screen])
    page = open_page(context, server)
    found = []
    for view in VIEWS:
        server.headers, server.answers = {}, []
        view(page, server)
        page.wait_for_timeout(250)  # dialogs have come to rest
        found += [f"{view.__name__}: {it}" for it in axe(page)] if screen != "narrow" else []
        if page.evaluate("() => document.documentElement.scrollWidth > innerWidth"):
            found.append(f"{view.__name__}: wider than the screen")
        server.release()
        context.set_offline(False)
        for _ in range(2):  # a menu and what is below it
            page.keyboard.press("Escape")
        if view is not key:
            page.click("#new")
    context.close()
    assert found == []


def tab_stops(page: Any, limit: int = 80) -> list[str]:
    """The names of what Tab reaches, in order, until it comes round."""
    name = """() => {
      const it = document.activeElement;
      return it === document.body ? "" : it.ariaLabel || it.labels?.[0]?.firstElementChild?.textContent ||
        it.textContent.trim() || it.id;
    }"""
    names: list[str] = []
    for _ in range(limit):
        page.keyboard.press("Tab")
        stop = page.evaluate(name)
        if stop and names and stop == names[0]:
            break
        if stop:
            names.append(stop)
    return names


def test_the_keyboard_reaches_everything(page: Any, server: ScriptedServer) -> None:
    server.answers = [["<think>Hm.</think>Look:\n\n```\ncode\n```\n\n[link](https://example.org)", call("look")]]
    server.tools = [tool("look")]
    page.reload()
    page.wait_for_selector("#tools-on")
    page.click("#tools-on")
    ask(page, "Where?")
    page.wait_for_selector(".consent:visible")
    page.fill("#input", "text")
    stops = " | ".join(tab_stops(page))
    for name in (
        "New chat", "Light or dark", "Settings", "Edit and send again", "Reasoning", "Copy code", "link", "look",
        "Arguments",
        "Run", "Decline", "Always run look here", "Copy answer", "Answer again", "Message", "Tools", "Send",
    ):  # fmt: skip
        assert name in stops, (name, stops)


def test_dialogs_take_the_focus_and_give_it_back(page: Any) -> None:
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.getElementById('settings').contains(document.activeElement)")
    page.keyboard.press("Escape")
    assert page.evaluate("() => document.activeElement.id") == "open-settings"


def test_the_focus_returns_to_the_field_when_an_answer_is_stopped(page: Any, server: ScriptedServer) -> None:
    server.answers = [["One", WAIT]]
    ask(page, "Count.")
    grown(page, "One")
    page.focus("#stop")
    page.keyboard.press("Enter")
    answered(page)
    assert page.evaluate("() => document.activeElement.id") == "input"


def test_nothing_moves_for_those_who_asked_for_that(browser: Any, server: ScriptedServer) -> None:
    context = browser.new_context(reduced_motion="reduce")
    page = open_page(context, server)
    thinking(page, server)
    assert page.evaluate("() => document.getAnimations().length") == 0
    context.close()

"""Tools of the server on the page: offered with a switch, run with consent, declined, and run without a question."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.page.conftest import answered, ask, grown
from tests.e2e.page.scripted_server import ScriptedServer, call, tool
from tests.e2e.server_process import until


@pytest.fixture
def page(page: Any, server: ScriptedServer) -> Any:
    """The page of a server with two tools, which are switched on."""
    server.tools = [tool("look"), tool("fail")]
    page.reload()
    page.click("#tools-on")
    return page


def asked(page: Any) -> None:
    page.wait_for_selector(".consent:visible")


def last_messages(server: ScriptedServer, number: int) -> list[Any]:
    messages = server.bodies[-1]["messages"][-number:]
    return [(it["role"], it["content"], it.get("tool_call_id")) for it in messages]


def test_tools_are_offered_only_when_they_are_switched_on(page: Any, server: ScriptedServer) -> None:
    assert page.get_attribute("#tools-on", "aria-pressed") == "true" and "look, fail" in page.inner_text("#tools-hint")
    ask(page, "One")
    answered(page)
    page.click("#tools-on")
    ask(page, "Two")
    answered(page, 2)
    assert server.bodies[0]["tools"] == server.tools and "tools" not in server.bodies[1]


def test_a_call_runs_with_consent_and_the_answer_goes_on(page: Any, server: ScriptedServer) -> None:
    server.answers = [["I look.", call("look", where="here")], ["Found."]]
    ask(page, "Where?")
    asked(page)
    assert '"where": "here"' in page.inner_text(".call pre") and server.calls == []
    page.reload()  # the question about the call stays
    asked(page)
    page.locator(".consent").get_by_role("button", name="Run", exact=True).click()
    grown(page, "Found.")
    assert server.calls == [{"name": "look", "arguments": {"where": "here"}}]
    assert last_messages(server, 1) == [("tool", "result of look", "call_look")]
    assert server.bodies[-1]["messages"][-2]["tool_calls"][0]["function"]["arguments"] == '{"where": "here"}'
    assert '"here" → result of look' in page.inner_text(".call summary")


def test_a_declined_call_is_told_to_the_model(page: Any, server: ScriptedServer) -> None:
    server.answers = [[call("look")], ["Pity."]]
    ask(page, "Where?")
    asked(page)
    page.get_by_role("button", name="Decline").click()
    grown(page, "Pity.")
    assert server.calls == [] and last_messages(server, 1) == [
        ("tool", "The user declined to run this tool.", "call_look")
    ]


def test_the_keyboard_decides_on_a_call(page: Any, server: ScriptedServer) -> None:
    server.answers = [[call("look")], ["Found."]]
    ask(page, "Where?")
    asked(page)
    focused = "document.activeElement.textContent"
    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        if page.evaluate(focused) == "Run":
            break
    page.keyboard.press("Enter")
    grown(page, "Found.")
    assert len(server.calls) == 1


def test_several_calls_are_decided_on_one_by_one(page: Any, server: ScriptedServer) -> None:
    server.answers = [[call("look"), call("fail")], ["Done."]]
    ask(page, "Both")
    asked(page)
    page.locator(".consent").nth(1).get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector(".state.bad")
    assert len(server.bodies) == 1 and page.locator(".consent:visible").count() == 1
    page.locator(".consent").nth(0).get_by_role("button", name="Decline").click()
    grown(page, "Done.")
    assert {it[2] for it in last_messages(server, 2)} == {"call_look", "call_fail"}


def test_a_tool_that_may_always_run_asks_no_more_in_this_conversation(page: Any, server: ScriptedServer) -> None:
    server.answers = [[call("look")], [call("look")], ["Found."]]
    ask(page, "Where?")
    asked(page)
    page.get_by_role("button", name="Always run look here").click()
    grown(page, "Found.")
    assert len(server.calls) == 2
    page.click("#new")
    server.answers = [[call("look")]]
    ask(page, "Where?")
    asked(page)
    assert len(server.calls) == 2


def test_a_model_that_calls_without_end_asks_again(page: Any, server: ScriptedServer) -> None:
    server.answers = [[call("look")] for _ in range(30)]
    ask(page, "Where?")
    asked(page)
    page.get_by_role("button", name="Always run look here").click()
    asked(page)
    assert 5 <= len(server.calls) < 15


def test_a_new_question_declines_the_call_that_was_not_decided_on(page: Any, server: ScriptedServer) -> None:
    server.answers = [[call("look")]]
    ask(page, "Where?")
    asked(page)
    ask(page, "Never mind")
    answered(page, 2)
    roles = [it["role"] for it in server.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "tool", "user"] and page.locator(".consent:visible").count() == 0


def test_a_tool_that_cannot_be_reached_can_be_run_again(page: Any, server: ScriptedServer) -> None:
    server.answers = [[call("look")], ["Found."]]
    ask(page, "Where?")
    asked(page)
    page.context.set_offline(True)
    page.locator(".consent").get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector("#notice.bad")
    page.context.set_offline(False)
    page.locator(".consent").get_by_role("button", name="Run", exact=True).click()
    grown(page, "Found.")
    until(lambda: page.locator("#notice").is_hidden())


def test_a_server_without_tools_has_no_switch(page: Any, server: ScriptedServer) -> None:
    server.tools = []
    page.reload()
    page.wait_for_selector("#starters button")
    assert page.locator("#tools-on").is_hidden() and page.locator("#tools-hint").is_hidden()
    ask(page, "One")
    answered(page)
    assert "tools" not in server.bodies[-1]

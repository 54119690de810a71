"""Questions and answers on the page: growing, stopping, waiting, editing, and what is kept when something breaks."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from tests.e2e.page.conftest import answered, ask, grown, open_page
from tests.e2e.page.scripted_server import BREAK, WAIT, ScriptedServer
from tests.e2e.server_process import until


def test_an_answer_grows_and_ends(page: Any, server: ScriptedServer) -> None:
    server.answers = [["One **two**", WAIT, " three."]]
    ask(page, "Count.")
    grown(page, "One two")
    assert page.get_attribute("#log", "aria-busy") == "true" and page.locator("#stop").is_visible()
    server.release()
    answered(page)
    assert page.inner_text(".answer > .text") == "One two three." and page.locator(".answer strong").count() == 1
    assert "2 tokens" in page.inner_text(".stats") and page.locator("#stop").is_hidden()
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "Count."}] and server.bodies[0]["stream"]


def test_a_stopped_answer_stays_and_goes_along(page: Any, server: ScriptedServer) -> None:
    server.answers = [["One ", WAIT, "two"]]
    ask(page, "Count.")
    grown(page, "One")
    page.keyboard.press("Escape")
    answered(page)
    assert page.inner_text(".stats") == "stopped"
    ask(page, "Go on.")
    answered(page, 2)
    assert [it["content"] for it in server.bodies[1]["messages"]] == ["Count.", "One ", "Go on."]


def test_a_question_during_an_answer_waits_for_its_end(page: Any, server: ScriptedServer) -> None:
    server.answers = [["One", WAIT, "."], ["Two."]]
    ask(page, "First")
    grown(page, "One")
    ask(page, "Second")
    ask(page, "Third")
    assert page.locator("#queue li").all_inner_texts() == ["Second", "Third"] and len(server.bodies) == 1
    page.locator("#queue li").nth(1).get_by_role("button", name="Take back").click()
    assert page.input_value("#input") == "Third" and page.locator("#queue li").count() == 1
    server.release()
    answered(page, 2)
    assert [it["content"] for it in server.bodies[1]["messages"]] == ["First", "One.", "Second"]
    assert page.locator("#queue").is_hidden() and page.input_value("#input") == "Third"


def test_a_stop_keeps_the_waiting_questions_until_the_user_sends_them(page: Any, server: ScriptedServer) -> None:
    server.answers = [["One", WAIT]]
    ask(page, "First")
    grown(page, "One")
    ask(page, "Second")
    page.click("#stop")
    answered(page)
    page.reload()
    assert page.inner_text("#queue span") == "Second" and len(server.bodies) == 1
    page.get_by_role("button", name="Send now").click()
    answered(page, 2)
    assert server.bodies[1]["messages"][-1]["content"] == "Second"


def test_an_edited_question_replaces_what_followed(page: Any, server: ScriptedServer) -> None:
    for count, text in enumerate(("One", "Two"), 1):
        ask(page, text)
        answered(page, count)
    page.fill("#input", "a draft")
    page.locator(".question").first.hover()
    page.get_by_role("button", name="Edit and send again").first.click()
    assert page.input_value("#input") == "One" and page.locator("#editing").is_visible()
    ask(page, "Three")
    answered(page)
    assert page.locator(".question .text").all_inner_texts() == ["Three"]
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Three"}]
    assert page.input_value("#input") == "a draft"


def test_another_answer_is_warmer_and_has_no_seed(page: Any, server: ScriptedServer) -> None:
    page.evaluate("localStorage['phi4_mlx.settings'] = JSON.stringify({seed: '7', temperature: '0'})")
    page.reload()
    ask(page, "One")
    answered(page)
    page.get_by_role("button", name="Answer again").click()
    until(lambda: len(server.bodies) == 2)
    answered(page)
    assert [(it["temperature"], it.get("seed")) for it in server.bodies] == [(0, 7), (0.8, None)]
    assert server.bodies[0]["messages"] == server.bodies[1]["messages"]


def test_a_reload_during_an_answer_keeps_what_had_come(page: Any, server: ScriptedServer) -> None:
    server.answers = [["One two three", WAIT]]
    ask(page, "Count.")
    grown(page, "three")
    page.reload()
    grown(page, "three")
    assert page.inner_text(".stats") in ("broken off", "not complete")  # the one that came first
    assert page.inner_text("#notice-text") == "The last answer is not complete."
    page.click("#notice-action")
    answered(page)
    assert page.inner_text(".answer > .text") == "All right." and page.locator(".question").count() == 1


def test_a_draft_survives_a_reload(page: Any, server: ScriptedServer) -> None:
    page.wait_for_function("sessionStorage.length")  # a conversation is open
    page.fill("#input", "not sent yet")
    page.reload()
    until(lambda: page.input_value("#input") == "not sent yet")
    ask(page, "sent")
    answered(page)
    page.reload()
    page.wait_for_selector(".answer")
    assert page.input_value("#input") == "" and server.bodies[0]["messages"][0]["content"] == "sent"


def test_what_is_typed_before_the_page_is_ready_stays(browser: Any, server: ScriptedServer) -> None:
    context = browser.new_context()
    page = context.new_page()
    held: list[Any] = []
    page.route("**/page/main.js", lambda route: held.append(route))
    page.goto(server.url, wait_until="commit")
    page.fill("#input", "early bird")
    until(lambda: held or page.wait_for_timeout(20))
    held[0].continue_()
    page.wait_for_selector("#starters button")
    assert page.input_value("#input") == "early bird"
    page.press("#input", "Enter")
    answered(page)
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "early bird"}]
    context.close()


def test_a_broken_connection_keeps_the_text_and_can_be_retried(page: Any, server: ScriptedServer) -> None:
    server.answers = [["One ", WAIT, BREAK], ["Two."]]
    ask(page, "Count.")
    grown(page, "One")
    server.release()
    page.wait_for_selector("#notice.bad")
    assert "connection ended" in page.inner_text("#notice-text") and "broken off" in page.inner_text(".stats")
    assert page.inner_text(".answer > .text").strip() == "One"
    page.click("#notice-action")
    grown(page, "Two.")
    assert page.locator("#notice").is_hidden() and page.locator(".answer").count() == 1


def test_without_a_server_nothing_is_lost(browser: Any, server: ScriptedServer) -> None:
    context = browser.new_context()
    page = open_page(context, server)
    context.set_offline(True)
    ask(page, "Are you there?")
    page.wait_for_selector("#notice.bad")
    assert page.inner_text("#notice-text") == "The server does not answer. Is it running?"
    assert page.inner_text(".question .text") == "Are you there?" and page.locator(".answer").count() == 0
    context.set_offline(False)
    server.kind = "base"  # another server, meanwhile
    page.click("#notice-action")
    answered(page)
    assert [it["content"] for it in server.bodies[0]["messages"]] == ["Are you there?"]
    page.wait_for_selector("#hint:has-text('base model')", state="attached")
    context.close()


def test_a_refusal_is_shown_in_the_servers_words(page: Any, server: ScriptedServer) -> None:
    server.answers = [JSONResponse({"error": {"message": "prompt is too long: 9 tokens > 8"}}, 400)]  # type: ignore[list-item]
    ask(page, "Long")
    page.wait_for_selector("#notice.bad")
    assert page.inner_text("#notice-text") == "prompt is too long: 9 tokens > 8"
    page.reload()
    page.wait_for_selector(".question")
    assert "no answer" in page.inner_text("#notice-text")


def test_what_was_ignored_and_an_early_end_are_told(page: Any, server: ScriptedServer) -> None:
    server.headers = {"x-phi4-ignored": "messages[0], max_tokens"}
    ask(page, "One")
    answered(page)
    assert "ignored: messages[0], max_tokens" in page.inner_text(".stats")


def test_reasoning_is_folded_away_and_not_sent_back(page: Any, server: ScriptedServer) -> None:
    server.answers = [["<thi", "nk>Let me", WAIT, " see.</thi", "nk>\n\nIt is 4."]]
    server.answers += [[{"reasoning_content": "Hm."}, "Five."]]
    ask(page, "2 + 2")
    page.wait_for_selector(".thought.growing")
    assert page.locator(".answer > .text >> visible=true").all_inner_texts() in ([], [""])
    server.release()
    answered(page)
    assert page.inner_text(".answer > .text") == "It is 4." and page.inner_text(".thought summary") == "Reasoning"
    page.click(".thought summary")
    until(lambda: page.inner_text(".thought .text") == "Let me see.")
    ask(page, "and 1?")
    answered(page, 2)
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "It is 4."}
    assert page.locator(".answer > .text").last.inner_text() == "Five."


def test_text_of_a_model_is_never_a_script(page: Any, server: ScriptedServer) -> None:
    evil = '<img src=x onerror="window.hit=1"><script>window.hit=1</script> [x](javascript:window.hit=1)'
    server.answers = [[evil, evil]]
    ask(page, evil)
    answered(page)
    page.wait_for_timeout(200)
    assert page.evaluate("window.hit") is None
    assert page.locator("#log :is(img, script, a[href^=javascript])").count() == 0


GROW_WITHIN_A_SCROLL = """() => {
  const last = document.querySelector(".answer:last-child");
  last.style.paddingBottom = "300px";
  document.getElementById("scroller").dispatchEvent(new Event("scroll"));
}"""


def test_the_view_follows_the_end_until_the_user_scrolls_up(page: Any, server: ScriptedServer) -> None:
    below = "(it => it.scrollHeight - it.scrollTop - it.clientHeight)(document.getElementById('scroller'))"
    long = "\n\n".join(f"Paragraph {i} with $x^{i}$\n\n```python\nx = {i}\n```" for i in range(20))
    server.answers = [[long], [long, WAIT, "\n\nmore" * 30, WAIT, "\n\nyet more" * 30]]
    for _ in server.answers[:]:
        ask(page, "Count.")
        grown(page, "Paragraph 19")
        until(lambda: page.locator(".answer:last-child math").count() == 20 and page.evaluate(below) < 2)
        assert page.locator("#latest").is_hidden()
    page.evaluate(GROW_WITHIN_A_SCROLL)
    until(lambda: page.evaluate(below) < 2)
    server.release()
    grown(page, "more")
    until(lambda: page.evaluate(below) < 2)
    page.mouse.move(400, 300)
    page.mouse.wheel(0, -600)
    page.wait_for_selector("#latest:visible")
    server.release()
    answered(page, 2)
    assert page.evaluate(below) > 500
    page.click("#latest")
    until(lambda: page.evaluate(below) < 2)

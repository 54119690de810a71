"""The list of conversations: by mouse, by keyboard alone, on a phone, with nothing and with a lot in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.page.conftest import answered, ask, axe, becomes_true, grown
from tests.e2e.page.scripted_server import WAIT, ScriptedServer
from tests.e2e.page.test_store import MANY, kept, texts, titles

PHONE = {"width": 390, "height": 844}


@pytest.fixture
def three(page: Any) -> Any:
    """A page with three conversations, the last one open."""
    for text in ("Apples", "Pears", "Plums"):
        page.click("#new")
        ask(page, text)
        answered(page)
        page.wait_for_selector(f"#sidebar [aria-current]:has-text('{text}')")
    return page


def choose(page: Any, title: str, action: str) -> None:
    """Runs an action of a conversation's menu."""
    page.hover(f"#sidebar li:has-text('{title}')")
    page.get_by_role("button", name=f"More for {title}").click()
    page.get_by_role("menuitem", name=action).click()


def test_conversations_are_opened_and_begun(three: Any) -> None:
    assert titles(three) == ["Plums", "Pears", "Apples"]
    three.click("#sidebar .open:has-text('Pears')")
    three.wait_for_selector(".question:has-text('Pears')")
    assert three.inner_text("#sidebar [aria-current]") == "Pears"
    three.get_by_role("button", name="New conversation").click()
    three.wait_for_selector("#empty:not([hidden])")
    assert three.locator("#sidebar [aria-current]").count() == 0 and len(titles(three)) == 3


def test_a_conversation_is_renamed_in_its_place(three: Any) -> None:
    choose(three, "Pears", "Rename")
    three.keyboard.type("Pears and <b>more</b>")
    three.keyboard.press("Enter")
    three.wait_for_selector("#sidebar .title:text-is('Pears and <b>more</b>')")
    choose(three, "Plums", "Rename")
    three.keyboard.type("not this")
    three.keyboard.press("Escape")
    three.reload()
    three.wait_for_selector("#sidebar .title >> nth=2")
    assert sorted(titles(three)) == ["Apples", "Pears and <b>more</b>", "Plums"]


def test_a_conversation_that_is_being_answered_is_renamed(page: Any, server: ScriptedServer) -> None:
    server.answers = [["One", WAIT, " two"]]
    ask(page, "Count")
    grown(page, "One")
    choose(page, "Count", "Rename")
    page.keyboard.type("Numbers")
    page.keyboard.press("Enter")
    server.release()
    answered(page)
    becomes_true(page, "document.querySelector('#sidebar .title').textContent === 'Numbers'")
    (found,) = kept(page)
    assert found["title"] == "Numbers" and texts(found) == ["Count", "One two"]


def test_a_deleted_conversation_comes_back(three: Any) -> None:
    choose(three, "Plums", "Delete")
    three.wait_for_selector("#empty:not([hidden])")
    assert titles(three) == ["Pears", "Apples"] and len(kept(three)) == 2
    three.get_by_role("button", name="Undo").click()
    three.wait_for_selector("#sidebar .title:has-text('Plums')")
    three.click("#sidebar .open:has-text('Plums')")
    three.wait_for_selector(".answer")
    ask(three, "More plums")
    answered(three, 2)
    becomes_true(three, "document.querySelectorAll('#sidebar .title').length === 3")
    assert sorted(len(it["messages"]) for it in kept(three)) == [2, 2, 4]


def test_a_conversation_is_deleted_while_it_is_being_answered(page: Any, server: ScriptedServer) -> None:
    server.answers = [["One", WAIT, " two"]]
    ask(page, "Count")
    grown(page, "One")
    choose(page, "Count", "Delete")
    page.wait_for_selector("#empty:not([hidden])")
    server.release()
    page.wait_for_timeout(700)  # longer than the pause between two saves
    assert kept(page) == []
    page.get_by_role("button", name="Undo").click()
    page.click("#sidebar .open:has-text('Count')")
    grown(page, "One")


def test_an_answer_goes_on_while_another_conversation_is_open(page: Any, server: ScriptedServer) -> None:
    server.answers = [["One", WAIT, " two"]]
    ask(page, "Count")
    grown(page, "One")
    page.click("#new")
    ask(page, "Something else")
    answered(page)
    server.release()
    becomes_true(page, "import('/page/conversation.js').then(({ answering }) => answering.size === 0)")
    page.click("#sidebar .open:has-text('Count')")
    grown(page, "One two")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("pear", ["Pears"]),
        ("PLUMS", ["Plums"]),
        ("all right", ["Plums", "Pears", "Apples"]),
        ("right apple", ["Apples"]),
        ("cherries", []),
        ("<b>", []),
        ("[", []),
    ],
)
def test_the_search_looks_in_titles_and_texts(three: Any, query: str, expected: list[str]) -> None:
    three.fill("#sidebar [type=search]", query)
    assert titles(three) == expected
    if not expected:
        assert f"“{query}”" in three.inner_text("#sidebar .told")
    three.press("#sidebar [type=search]", "Escape")
    assert len(titles(three)) == 3


def test_accents_and_case_do_not_matter_to_the_search(page: Any) -> None:
    ask(page, "Größe des Café İstanbul, ΑΘΗΝΑ")
    answered(page)
    for query in ("GRÖSSE", "groß", "cafe", "CAFÉ", "istanbul", "αθηνα"):
        page.fill("#sidebar [type=search]", query)
        assert len(titles(page)) == (0 if query == "GRÖSSE" else 1), query


def test_exports_are_read_and_imported(three: Any, tmp_path: Path) -> None:
    with three.expect_download() as markdown:
        choose(three, "Pears", "Export as Markdown")
    assert markdown.value.suggested_filename == "Pears.md"
    assert Path(markdown.value.path()).read_text() == "# Pears\n\n## You\n\nPears\n\n## Answer\n\nAll right.\n"
    with three.expect_download() as everything:
        three.click("#sidebar :text('Export all')")
    exported = json.loads(Path(everything.value.path()).read_text())
    assert sorted(it["title"] for it in exported["conversations"]) == ["Apples", "Pears", "Plums"]
    file = tmp_path / "export.json"
    file.write_text(json.dumps(exported))
    three.set_input_files("#sidebar [type=file]", file)
    three.wait_for_selector("#sidebar .told:has-text('3 imported')")
    assert len(kept(three)) == 6
    file.write_text("[1]")
    three.set_input_files("#sidebar [type=file]", file)
    three.wait_for_selector("#sidebar .told:has-text('no export')")
    assert len(kept(three)) == 6


def test_everything_is_reached_by_keyboard(three: Any) -> None:
    three.focus("#sidebar [type=search]")
    three.keyboard.press("ArrowDown")
    assert three.evaluate("document.activeElement.textContent") == "Plums"
    three.keyboard.press("ArrowDown")
    three.keyboard.press("Enter")
    three.wait_for_selector(".question:has-text('Pears')")
    three.focus("#sidebar [aria-current]")
    three.keyboard.press("Tab")
    assert three.evaluate("document.activeElement.ariaLabel") == "More for Pears"
    three.keyboard.press("Enter")
    three.keyboard.press("ArrowDown")
    assert three.evaluate("document.activeElement.textContent") == "Export as Markdown"
    three.keyboard.press("Escape")
    assert three.evaluate("document.activeElement.ariaLabel") == "More for Pears"
    three.keyboard.press("Tab")
    assert three.evaluate("document.activeElement.textContent") == "Export all"  # one stop for the whole list
    three.focus("#sidebar [aria-current]")
    three.keyboard.press("F2")
    three.keyboard.type("Quinces")
    three.keyboard.press("Enter")
    three.wait_for_selector("#sidebar .title:has-text('Quinces')")
    three.keyboard.press("Delete")
    three.wait_for_selector("#sidebar .told:has-text('“Quinces” has been deleted.')")
    three.get_by_role("button", name="Undo").focus()
    three.keyboard.press("Enter")
    three.wait_for_selector("#sidebar .title:has-text('Quinces')")


def test_on_a_phone_the_list_covers_the_page_and_holds_the_focus(three: Any) -> None:
    three.set_viewport_size(PHONE)
    three.wait_for_selector("#sidebar", state="hidden")
    three.click("#sidebar-toggle")
    assert three.evaluate("document.activeElement.type") == "search"
    for _ in range(12):
        three.keyboard.press("Tab")
        assert three.evaluate("document.activeElement.matches('body, #sidebar *')")
    assert axe(three) == []
    three.keyboard.press("Escape")
    three.wait_for_selector("#sidebar", state="hidden")
    assert three.evaluate("document.activeElement.id") == "sidebar-toggle"
    three.click("#sidebar-toggle")
    three.click("#sidebar .open:has-text('Apples')")
    three.wait_for_selector(".question:has-text('Apples')")
    assert three.locator("#sidebar").is_hidden() and not three.evaluate("document.getElementById('chat').inert")
    assert three.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_list_stays_closed_over_a_reload(page: Any) -> None:
    page.wait_for_selector("#sidebar")
    page.click("#sidebar-toggle")
    page.reload()
    page.wait_for_selector("#chat")
    assert page.locator("#sidebar").is_hidden() and page.get_attribute("#sidebar-toggle", "aria-expanded") == "false"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_list_has_no_violations(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    assert axe(page) == []  # empty
    page.evaluate(MANY, 30)
    page.reload()
    page.wait_for_selector("#sidebar .title >> nth=29")
    page.fill("#sidebar [type=search]", "answer")
    page.hover("#sidebar li")
    page.locator("#sidebar .more").first.click()
    assert axe(page) == []


def test_a_long_title_stays_on_its_line(page: Any) -> None:
    ask(page, "word" * 500)
    answered(page)
    row = page.locator("#sidebar .open").bounding_box()
    assert row["height"] < 50 and row["x"] + row["width"] <= 280

"""The storage of the browser: over reloads, between tabs, with many conversations, and where nothing may be kept."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.page.conftest import answered, ask, becomes_true, grown, open_page
from tests.e2e.page.scripted_server import WAIT, ScriptedServer

ALL = """import("/page/storage/store.js").then(async ({ Store }) => {
    const store = new Store();
    await store.open();
    return store.all();
})"""
MANY = """async (count) => {
    const { Store } = await import("/page/storage/store.js");
    const store = new Store();
    await store.open();
    for (let i = 0; i < count; i++) {
        const messages = [
            { role: "user", content: `Question ${i}` },
            { role: "assistant", content: `Answer ${i} ` + "with words ".repeat(1500), finish: "stop" },
        ];
        const updated = Date.now() - i * 3_600_000;
        await store.save({ id: `id${i}`, title: `Title ${i}`, messages, updated, draft: "", queued: [], allowed: [] });
    }
}"""


def kept(page: Any) -> list[dict[str, Any]]:
    """All stored conversations, the oldest first."""
    found: list[dict[str, Any]] = page.evaluate(ALL)
    return sorted(found, key=lambda it: it["created"])


def texts(conversation: dict[str, Any]) -> list[str]:
    return [it["content"] for it in conversation["messages"]]


def titles(page: Any) -> list[str]:
    found: list[str] = page.locator("#sidebar .title").all_text_contents()
    return found


def second_tab(page: Any, server: ScriptedServer) -> Any:
    """Another tab with the conversation of the first."""
    other = open_page(page.context, server)
    other.locator("#sidebar .open").first.click()
    other.wait_for_selector(".question")
    return other


def test_a_conversation_and_a_draft_survive_a_reload(page: Any) -> None:
    ask(page, "First")
    answered(page)
    page.fill("#input", "a thought that is not fini")
    page.reload()  # at once: sooner than the draft's own save
    page.wait_for_selector(".answer")
    assert page.inner_text(".answer > .text") == "All right."
    becomes_true(page, "document.getElementById('input').value === 'a thought that is not fini'")
    assert [texts(it) for it in kept(page)] == [["First", "All right."]]


def test_a_draft_alone_survives_and_leaves_nothing_when_it_is_deleted(page: Any) -> None:
    page.fill("#input", "only a draft")
    page.reload()
    becomes_true(page, "document.getElementById('input').value === 'only a draft'")
    page.wait_for_selector("#sidebar .title:has-text('only a draft')")
    page.fill("#input", "")
    page.wait_for_selector("#sidebar .title", state="detached")
    assert kept(page) == []


def test_a_reload_in_the_middle_of_an_answer_loses_nothing(page: Any, server: ScriptedServer) -> None:
    server.answers = [["The beginning", " and more", WAIT, " and the end"]]
    ask(page, "Tell me.")
    grown(page, "and more")
    page.reload()
    server.release()
    grown(page, "The beginning and more")
    page.click("#notice-action")
    grown(page, "All right.")
    assert [texts(it) for it in kept(page)] == [["Tell me.", "All right."]]


def test_a_tab_that_is_closed_in_the_middle_of_an_answer_loses_nothing(page: Any, server: ScriptedServer) -> None:
    server.answers = [["The beginning", WAIT]]
    ask(page, "Tell me.")
    grown(page, "The beginning")
    ask(page, "And then?")
    page.close(run_before_unload=True)
    other = open_page(page.context, server)
    other.locator("#sidebar .open").first.click()
    grown(other, "The beginning")
    assert other.inner_text("#queue") != "" and len(kept(other)) == 1


def test_the_list_of_each_tab_follows_the_others(page: Any, server: ScriptedServer) -> None:
    other = open_page(page.context, server)
    ask(page, "First")
    answered(page)
    other.wait_for_selector("#sidebar .title:has-text('First')")
    other.click("#sidebar .open")
    other.wait_for_selector(".answer")
    ask(other, "Second")
    answered(other, 2)
    page.wait_for_selector(".answer >> nth=1")  # the same conversation goes on in the first tab
    page.fill("#input", "my own draft")
    ask(other, "Third")
    answered(other, 3)
    page.wait_for_selector(".answer >> nth=2")
    assert page.input_value("#input") == "my own draft" and other.input_value("#input") == ""
    assert [texts(it)[::2] for it in kept(page)] == [["First", "Second", "Third"]]


def test_two_tabs_that_ask_at_once_keep_both(page: Any, server: ScriptedServer) -> None:
    ask(page, "First")
    answered(page)
    page.context.add_init_script("delete window.BroadcastChannel")  # what the first tab does is told too late
    other = second_tab(page, server)
    server.answers = [["From one", WAIT, "."], ["From two", WAIT, "."]]
    ask(page, "One?")
    grown(page, "From one")
    becomes_true(page, f"{ALL}.then(([it]) => it.messages.length === 4)")
    ask(other, "Two?")
    grown(other, "From two")
    server.release()
    answered(page, 2)
    answered(other, 2)
    becomes_true(page, f"{ALL}.then((all) => all.length === 2 && all.every((it) => it.messages[3]?.finish))")
    first, copy = kept(page)
    assert texts(first)[2:] == ["One?", "From one."] and texts(copy)[2:] == ["Two?", "From two."]
    assert (first["title"], copy["title"]) == ("First", "First (copy)")
    assert other.inner_text("#sidebar [aria-current]") == "First (copy)"
    other.reload()
    other.wait_for_selector(".question:has-text('Two?')")


def test_a_tab_watches_what_another_one_is_answering(page: Any, server: ScriptedServer) -> None:
    server.answers = [["The beginning", WAIT, " and the end."]]
    ask(page, "Tell me.")
    grown(page, "The beginning")
    other = second_tab(page, server)
    other.wait_for_selector("#notice-text:text-is('Another tab is answering.')")
    server.release()
    grown(other, "The beginning and the end.")
    other.wait_for_selector("#notice", state="hidden")
    server.answers = [["More", WAIT]]
    ask(page, "And then?")
    grown(other, "More")
    page.close()
    other.wait_for_selector("#notice-text:text-is('The last answer is not complete.')")


def test_what_one_tab_has_not_seen_yet_is_taken_over_before_it_saves(page: Any, server: ScriptedServer) -> None:
    ask(page, "First")
    answered(page)
    other = second_tab(page, server)
    other.evaluate("""async () => {
        const { current, save } = await import("/page/conversation.js");
        const { Store } = await import("/page/storage/store.js");
        const store = new Store();
        await store.open();
        const newer = await store.load(current.id);
        newer.messages.push({ role: "user", content: "Second" });
        newer.messages.push({ role: "assistant", content: "Yes.", finish: "stop" });
        await store.save(newer);
        current.draft = "mine";
        await save();
    }""")  # fmt: skip
    grown(other, "Yes.")
    (found,) = kept(other)
    assert texts(found) == ["First", "All right.", "Second", "Yes."] and found["draft"] == "mine"


def test_what_a_closed_tab_has_left_stays_until_it_is_taken_in(page: Any, server: ScriptedServer) -> None:
    ask(page, "First")
    answered(page)
    other = second_tab(page, server)
    server.answers = [["One", WAIT]]
    ask(page, "Second")
    grown(page, "One")
    page.evaluate("IDBObjectStore.prototype.get = () => new EventTarget()")  # from now on its saves do not end
    ask(page, "Third")
    page.goto("about:blank")
    ask(other, "Fourth")
    other.wait_for_selector(".question:has-text('Fourth')")
    becomes_true(other, f"{ALL}.then((all) => JSON.stringify(all).includes('Fourth'))")
    server.release()
    page.goto(server.url)
    everything = "(all) => ['Second', 'Third', 'Fourth'].every((it) => JSON.stringify(all).includes(it))"
    becomes_true(page, f"{ALL}.then({everything})")


def test_what_is_asked_during_a_save_is_kept(page: Any, server: ScriptedServer) -> None:
    """A newer state is taken over by a save whose transaction has not ended when the next question comes."""
    ask(page, "First")
    answered(page)
    texts_kept = page.evaluate("""async () => {
        const { current } = await import("/page/conversation.js");
        const { Store } = await import("/page/storage/store.js");
        const store = new Store();
        await store.open();
        const newer = await store.load(current.id);
        newer.messages.push({ role: "user", content: "Second" });
        await store.save(newer);
        const mine = structuredClone(current);
        mine.revision = newer.revision - 1;
        const put = IDBObjectStore.prototype.put;
        IDBObjectStore.prototype.put = function (value) {
            const request = put.call(this, value);
            mine.queued.push("Third");  // as a listener would, before the transaction has ended
            return request;
        };
        await store.save(mine);
        IDBObjectStore.prototype.put = put;
        return [...mine.messages.map((it) => it.content), ...mine.queued];
    }""")  # fmt: skip
    assert texts_kept == ["First", "All right.", "Second", "Third"]


def test_a_conversation_that_another_tab_deletes_leaves_the_page(page: Any, server: ScriptedServer) -> None:
    ask(page, "First")
    answered(page)
    other = second_tab(page, server)
    other.fill("#input", "still mine")
    page.locator("#sidebar .open").first.press("Delete")
    other.wait_for_selector("#empty:not([hidden])")
    assert other.input_value("#input") == "still mine"
    page.get_by_role("button", name="Undo").click()
    other.wait_for_selector("#sidebar .title:has-text('First')")


def test_two_hundred_conversations_are_listed_and_searched_at_once(page: Any, server: ScriptedServer) -> None:
    page.evaluate(MANY, 250)
    page.reload()
    page.wait_for_selector("#sidebar .title >> nth=249")
    assert titles(page)[0] == "Title 0" and "Older" not in page.inner_text("#sidebar h3 >> nth=0")
    took = page.evaluate("""async () => {
        const { Store } = await import("/page/storage/store.js");
        const { Catalogue } = await import("/page/storage/catalogue.js");
        const store = new Store();
        await store.open();
        const catalogue = new Catalogue(store);
        await catalogue.read();
        const start = performance.now();
        const found = catalogue.find("ANSWER 249 words");
        return [performance.now() - start, found.map((it) => it.title)];
    }""")  # fmt: skip
    assert took[1] == ["Title 249"] and took[0] < 500  # a few milliseconds on an idle machine
    page.fill("#sidebar [type=search]", "answer 249")
    becomes_true(page, "document.querySelectorAll('#sidebar .title').length === 1")
    page.press("#sidebar [type=search]", "Enter")
    page.wait_for_selector(".question:has-text('Question 249')")
    assert len(kept(page)) == 250


OLD = [
    {"role": "user", "content": "Old question"},
    {"role": "assistant", "content": "Old answer", "finish": "stop", "usage": {"completion_tokens": 3}},
]


def test_the_conversation_of_the_older_page_is_taken_in_once(page: Any, server: ScriptedServer) -> None:
    page.evaluate("(messages) => localStorage.setItem('phi4_mlx.messages', JSON.stringify(messages))", OLD)
    page.reload()
    page.click("#sidebar .open:has-text('Old question')")
    grown(page, "Old answer")
    open_page(page.context, server)
    page.reload()
    assert [texts(it) for it in kept(page)] == [["Old question", "Old answer"]]
    assert page.evaluate("localStorage.getItem('phi4_mlx.messages')") is None


@pytest.mark.parametrize("junk", ["[]", "7", "{", '[{"role":"user"}]', '"text"', '[{"role":"evil","content":"x"}]'])
def test_junk_in_the_small_storage_is_no_conversation(page: Any, junk: str) -> None:
    page.evaluate("(it) => { localStorage.setItem('phi4_mlx.messages', it); }", junk)
    page.evaluate("(it) => { localStorage.setItem('phi4_mlx.unsaved.x', it); }", junk)
    page.reload()
    page.wait_for_selector("#sidebar :text('No conversations yet.')")
    assert kept(page) == []


FORBID = "Object.defineProperty(window, 'indexedDB', { get() { throw new DOMException('no', 'SecurityError'); } })"
FULL = """
const put = IDBObjectStore.prototype.put;
IDBObjectStore.prototype.put = function (value) {
    if (window.full) throw new DOMException("no room", "QuotaExceededError");
    return put.call(this, value);
};
"""


def test_a_browser_that_keeps_nothing_says_so_and_works(browser: Any, server: ScriptedServer) -> None:
    context = browser.new_context()
    context.add_init_script(FORBID)
    page = open_page(context, server)
    page.wait_for_selector("#notice-text:has-text('lost when the tab is closed')")
    ask(page, "First")
    answered(page)
    page.click("#new")
    ask(page, "Second")
    answered(page)
    page.click("#sidebar .open:has-text('First')")
    page.wait_for_selector(".question:has-text('First')")
    assert sorted(titles(page)) == ["First", "Second"] and page.errors == []
    assert "lost when the tab is closed" in page.inner_text("#sidebar")
    context.close()


def test_a_full_browser_says_so_and_keeps_what_it_has_in_memory(browser: Any, server: ScriptedServer) -> None:
    context = browser.new_context()
    context.add_init_script(FULL)
    page = open_page(context, server)
    ask(page, "First")
    answered(page)
    page.evaluate("window.full = true")
    ask(page, "Second")
    answered(page, 2)
    page.wait_for_selector("#notice-text:has-text('no room')")
    page.click("#new")
    page.click("#sidebar .open")
    page.wait_for_selector(".question:has-text('Second')")
    page.evaluate("window.full = false")
    ask(page, "Third")
    answered(page, 3)
    becomes_true(page, f"{ALL}.then(([it]) => it.messages.length === 6)")
    assert page.errors == []
    context.close()


def test_the_data_of_the_page_can_be_deleted_while_it_is_open(page: Any, server: ScriptedServer) -> None:
    ask(page, "First")
    answered(page)
    page.evaluate("new Promise((done) => { indexedDB.deleteDatabase('phi4_mlx').onsuccess = done; })")
    ask(page, "Second")
    answered(page, 2)
    becomes_true(page, f"{ALL}.then(([it]) => it?.messages.length === 4)")


def test_the_archive_reads_what_it_has_written_and_nothing_else(page: Any) -> None:
    outcome = page.evaluate("""async () => {
        const { fromJson, toJson } = await import("/page/storage/archive.js");
        const one = { id: "a", title: "T", updated: 1, created: 1, revision: 3, draft: "", queued: [], allowed: [],
            messages: [{ role: "user", content: "x" }] };
        const told = (json) => { try { return fromJson(json); } catch (error) { return error.message; } };
        const damaged = { ...one, messages: [{ role: "user" }] };
        return [told(toJson([one])), told("{"), told("[]"), told(JSON.stringify({ conversations: [one] })),
            told(toJson([one, damaged])), told("null")];
    }""")  # fmt: skip
    assert outcome[0][0]["messages"] == [{"role": "user", "content": "x"}]
    assert outcome[1].startswith("The file is not JSON") and "no export" in outcome[2] and "no export" in outcome[3]
    assert outcome[4].startswith("Conversation 2 of 2") and "no export" in outcome[5]

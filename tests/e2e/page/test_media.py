"""Pictures and sound on the page: adding, pricing, sending, showing and keeping them; and a text-only model."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media.audio import read_audio
from phi4_mlx.tokens.media.image import image_tokens
from tests.e2e.page.conftest import answered, ask, axe, becomes_true, grown, open_page
from tests.e2e.page.scripted_server import WAIT, ScriptedServer
from tests.unit.server.media_server import clip, picture

SETTINGS = {"crop_size": 448, "max_crops": 36}
PICTURE = {"name": "red.png", "mimeType": "image/png", "buffer": picture(60, 60)}
SOUND = {"name": "tone.wav", "mimeType": "audio/wav", "buffer": clip(1.0)}
DROP = """([name, type, text]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(text), (it) => it.charCodeAt(0))], name, { type }));
  dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
}"""
PASTE = """([name, type, text]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(text), (it) => it.charCodeAt(0))], name, { type }));
  const paste = new ClipboardEvent("paste", { clipboardData: data, cancelable: true });
  document.getElementById("input").dispatchEvent(paste);
}"""


@pytest.fixture
def page(browser: Any, server: ScriptedServer) -> Iterator[Any]:
    """The page of a model that reads pictures and sound."""
    server.media = SETTINGS
    context = browser.new_context()
    page = open_page(context, server)
    page.wait_for_selector("#attach:visible")
    yield page
    context.close()
    assert page.errors == []


def given(file: dict[str, Any]) -> list[str]:
    return [file["name"], file["mimeType"], base64.b64encode(file["buffer"]).decode()]


def add(page: Any, *files: dict[str, Any]) -> None:
    before = page.locator("#attachments li").count()
    page.set_input_files("#files", [*files])
    page.wait_for_selector(f"#attachments li >> nth={before + len(files) - 1}")


def test_media_are_sent_before_the_text_and_shown(page: Any, server: ScriptedServer) -> None:
    add(page, PICTURE, SOUND)
    assert page.locator("#attachments .price").all_inner_texts() == ["545 tokens", "13 tokens"]
    assert page.inner_text("#media-note") == "558 tokens for 2 attachments"
    ask(page, "What is it?")
    answered(page)
    (message,) = server.bodies[0]["messages"]
    image, sound, text = message["content"]
    assert image["image_url"]["url"] == f"data:image/png;base64,{base64.b64encode(PICTURE['buffer']).decode()}"
    assert sound["input_audio"]["format"] == "wav" and base64.b64decode(sound["input_audio"]["data"]) == SOUND["buffer"]
    assert text == {"type": "text", "text": "What is it?"}
    assert page.locator(".question img").get_attribute("alt") == "red.png"
    assert page.locator(".question audio").get_attribute("aria-label") == "tone.wav"
    becomes_true(page, "document.querySelector('.question img').naturalWidth === 60")
    becomes_true(page, "Math.abs(document.querySelector('.question audio').duration - 1) < 0.01")
    assert page.locator("#attachments").is_hidden() and axe(page) == []
    ask(page, "And its size?")
    answered(page, 2)
    assert server.bodies[1]["messages"][0]["content"][0] == image  # older turns keep theirs


def test_media_need_no_text_and_can_be_removed(page: Any, server: ScriptedServer) -> None:
    assert page.locator("#send").is_disabled()
    add(page, PICTURE, SOUND)
    assert page.locator("#send").is_enabled()
    page.get_by_role("button", name="Remove tone.wav").press("Enter")
    page.wait_for_selector("#attachments li >> nth=0")
    assert page.locator("#attachments li").count() == 1
    page.click("#send")
    answered(page)
    (part,) = server.bodies[0]["messages"][0]["content"]
    assert part["type"] == "image_url"
    assert page.title().startswith("red.png")


@pytest.mark.parametrize("way", [DROP, PASTE])
def test_files_are_dropped_or_pasted(page: Any, way: str) -> None:
    page.evaluate(way, given(PICTURE))
    page.wait_for_selector("#attachments img[alt='red.png']")


def test_what_cannot_be_read_is_said(page: Any) -> None:
    bad = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"a"}
    torn = {"name": "torn.png", "mimeType": "image/png", "buffer": PICTURE["buffer"][:50]}
    noise = {"name": "noise.mp3", "mimeType": "audio/mpeg", "buffer": b"\0" * 500}
    narrow = {"name": "line.png", "mimeType": "image/png", "buffer": picture(5000, 1)}
    page.set_input_files("#files", [bad, torn, noise, narrow])
    page.wait_for_selector("#notice:visible")
    told = page.inner_text("#notice-text")
    for name, why in (("notes.txt", "neither"), ("torn.png", "PNG or"), ("noise.mp3", "WAV"), ("line.png", "narrow")):
        assert name in told and why in told
    assert page.locator("#attachments li").count() == 0


def test_a_text_only_model_has_no_buttons_and_says_why_a_drop_is_not_added(
    browser: Any, server: ScriptedServer
) -> None:
    context = browser.new_context()
    page = open_page(context, server)
    page.wait_for_selector("#starters button")
    assert page.locator("#attach").is_hidden() and page.locator("#record").is_hidden()
    page.evaluate(DROP, given(PICTURE))
    page.wait_for_selector("#notice:visible")
    assert page.inner_text("#notice-text") == "This model reads only text: red.png not added."
    assert page.errors == []
    context.close()


def test_attachments_and_their_turns_are_kept_over_a_reload(page: Any, server: ScriptedServer) -> None:
    add(page, PICTURE)
    ask(page, "First")
    answered(page)
    add(page, SOUND)
    page.fill("#input", "a draft")
    page.wait_for_timeout(500)
    page.reload()
    page.wait_for_selector("#attachments audio")
    page.wait_for_selector(".question img")
    assert page.input_value("#input") == "a draft"
    ask(page, "Second")
    answered(page, 2)
    kinds = [[part["type"] for part in it["content"]] for it in server.bodies[-1]["messages"] if it["role"] == "user"]
    assert kinds == [["image_url", "text"], ["input_audio", "text"]]


def test_a_waiting_question_and_an_edited_one_keep_their_media(page: Any, server: ScriptedServer) -> None:
    server.answers = [["One", WAIT]]
    ask(page, "First")
    grown(page, "One")
    add(page, PICTURE)
    page.click("#send")
    assert page.inner_text("#queue span") == "red.png"
    page.get_by_role("button", name="Take back").click()
    page.wait_for_selector("#attachments img")
    page.click("#send")
    server.release()
    answered(page, 2)
    page.locator(".question").nth(1).hover()
    page.get_by_role("button", name="Edit and send again").nth(1).click()
    assert page.locator("#attachments img").count() == 1
    ask(page, "Look again.")
    answered(page, 2)
    assert [part["type"] for part in server.bodies[-1]["messages"][-1]["content"]] == ["image_url", "text"]


def test_the_microphone_is_recorded_as_wav(page: Any, server: ScriptedServer) -> None:
    page.click("#record")
    becomes_true(page, "/[1-9] tokens/.test(document.getElementById('media-note').textContent)")
    page.get_by_role("button", name="Stop recording").click()
    page.wait_for_selector("#attachments audio")
    page.click("#send")
    answered(page)
    (part,) = server.bodies[0]["messages"][0]["content"]
    data = base64.b64decode(part["input_audio"]["data"])
    assert part["input_audio"]["format"] == "wav" and read_audio(data).seconds > 0.1
    assert int.from_bytes(data[24:28], "little") == 16_000 and int.from_bytes(data[22:24], "little") == 1


def test_the_prices_equal_those_of_python(page: Any) -> None:
    sides = [*range(14, 120, 13), 447, 448, 449, 550, 686, 960, 1320, 1344, 2000, 3024, 4032, 9_999]
    sizes = [(width, height) for width in sides for height in sides]
    cases = [(width, height, crop, most) for width, height in sizes for crop, most in ((448, 36), (448, 1), (56, 4))]

    def expected(width: int, height: int, crop: int, most: int) -> int:
        try:
            return image_tokens(width, height, crop_size=crop, max_crops=most)
        except RequestError:
            return 0

    prices = """async (cases) => {
      const { imageTokens } = await import("./page/media/price.js");
      return cases.map(([width, height, crop_size, max_crops]) => imageTokens(width, height, { crop_size, max_crops }));
    }"""
    assert page.evaluate(prices, cases) == [expected(*case) for case in cases]
    seconds = [400 / 16_000, 559 / 16_000, 560 / 16_000, 1.0, 2.5, 9.115, 39.99]
    sounds = (
        "async (all) => { const { audioTokens } = await import('./page/media/price.js'); return all.map(audioTokens); }"
    )
    assert page.evaluate(sounds, [0.02, *seconds]) == [0, *(read_audio(clip(each)).tokens for each in seconds)]

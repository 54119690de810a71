"""Pictures and sounds in the chat: attached by commands and by paths in a line, dropped, undone, asked again, saved."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import pytest

from phi4_mlx.chat.__main__ import take_turn
from phi4_mlx.chat.commands import obey
from phi4_mlx.chat.session import Chat
from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media.image import read_image
from phi4_mlx.tokens.prompt import MediaSettings, Prompt
from tests.char_tokenizer import CharTokenizer
from tests.unit.chat.scripted import Script, questions, shown, type_lines

SETTINGS = MediaSettings(crop_size=28, max_crops=4, image_token=6, audio_token=7)


def save_picture(path: Path, colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (28, 28)) -> Path:
    import PIL.Image

    PIL.Image.new("RGB", size, colour).save(path)
    return path


def save_sound(path: Path, seconds: float = 1.0) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(2 * int(16_000 * seconds)))
    return path


@pytest.fixture
def chat(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """A chat with a model that reads media."""
    monkeypatch.setattr(CharTokenizer, "media", SETTINGS)
    return chat


@pytest.fixture
def red(tmp_path: Path) -> Path:
    return save_picture(tmp_path / "red one.png")


@pytest.fixture
def beep(tmp_path: Path) -> Path:
    return save_sound(tmp_path / "beep.wav")


def media(script: Script) -> list[tuple[str, str]]:
    assert isinstance(script.prompt, Prompt)
    return [(each.kind, each.digest) for each in script.prompt.media]


def digest(path: Path) -> str:
    return read_image(path, crop_size=SETTINGS.crop_size, max_crops=SETTINGS.max_crops).digest


def test_a_picture_and_a_sound_go_with_the_next_question(chat: Chat, script: Script, red: Path, beep: Path) -> None:
    obey(chat, f"/image {red}")
    assert "red one.png: " in shown(chat)
    assert [each.name for each in chat.pending] == ["red one.png"]
    obey(chat, f"/audio '{beep}'")
    assert "beep.wav: 1 second, 13 tokens; goes with the next question" in shown(chat)
    take_turn(chat, type_lines("what?"))
    assert [kind for kind, _ in media(script)] == ["image", "audio"] and media(script)[0][1] == digest(red)
    assert script.prompt.count(7) == 13 and chat.pending == []
    take_turn(chat, type_lines("and now?"))
    assert media(script) == [] or script.prompt.count(7) in (0, 13)  # in the cache, or read again with the first turn
    assert [len(turn.media) for turn in chat.conversation.turns] == [2, 0]


def test_files_that_are_dragged_into_the_line_are_attached(chat: Chat, script: Script, red: Path, beep: Path) -> None:
    take_turn(chat, type_lines(f"'{red}' "))
    assert questions(chat) == [] and len(chat.pending) == 1
    take_turn(chat, type_lines(f"is {beep} like file://{str(red).replace(' ', '%20')}?"))
    assert questions(chat) == ["is audio 1 like image 2?"]
    assert [kind for kind, _ in media(script)] == ["image", "audio", "image"]
    take_turn(chat, type_lines(f"{beep} what is said?"))
    assert questions(chat)[1] == "what is said?"


def test_enter_alone_asks_about_what_is_attached(chat: Chat, script: Script, beep: Path) -> None:
    take_turn(chat, type_lines(f"{beep}"))
    take_turn(chat, type_lines(""))
    assert questions(chat) == [""] and media(script)[0][0] == "audio"
    take_turn(chat, type_lines(""))
    assert questions(chat) == [""]


def test_other_paths_stay_text(chat: Chat, script: Script, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    save_picture(tmp_path / "red.png")
    line = f"see {tmp_path}/notes.png, {tmp_path}/none.png, `{tmp_path}/red.png` and {tmp_path}"
    take_turn(chat, type_lines(line))
    assert questions(chat) == [line] and chat.pending == []


def test_a_command_takes_several_files(chat: Chat, red: Path, beep: Path, tmp_path: Path) -> None:
    save_picture(tmp_path / "b.png")
    for line in (f"/image '{red}' b.png ", f"/image file://{tmp_path}/red%20one.png", r"/image red\ one.png"):
        obey(chat, line)
    assert [each.name for each in chat.pending] == ["red one.png", "b.png", "red one.png", "red one.png"]


def test_attached_files_are_listed_and_dropped(chat: Chat, red: Path, beep: Path) -> None:
    with pytest.raises(RequestError, match="nothing is attached"):
        obey(chat, "/drop")
    for _ in range(2):
        obey(chat, f"/image {red}")
    obey(chat, f"/audio {beep}")
    shown(chat)
    obey(chat, "/audio")
    assert "3  beep.wav: 1 second, 13 tokens\n" in shown(chat)
    for wrong in ("0", "4", "all", "-1"):
        with pytest.raises(RequestError, match="/drop takes a number from 1 to 3"):
            obey(chat, f"/drop {wrong}")
    obey(chat, "/drop 2")
    assert [each.name for each in chat.pending] == ["red one.png", "beep.wav"]
    obey(chat, "/drop")
    assert chat.pending == []


def test_a_question_that_is_refused_keeps_what_is_attached(chat: Chat, script: Script, red: Path) -> None:
    obey(chat, f"/image {red}")
    take_turn(chat, type_lines("x" * chat.conversation.context))
    assert questions(chat) == [] and len(chat.pending) == 1
    script.replies = [""]  # stopped before its first token
    take_turn(chat, type_lines("x"))
    assert questions(chat) == [] and len(chat.pending) == 1


def test_retry_asks_with_the_same_media(chat: Chat, script: Script, red: Path) -> None:
    take_turn(chat, type_lines(f"{red}\nwhat?"))
    obey(chat, f"/image {red}")
    obey(chat, "/retry")
    assert [len(turn.media) for turn in chat.conversation.turns] == [1] and len(chat.pending) == 1
    shown(chat)
    obey(chat, "/undo")
    assert "taken back: [red one.png] what?" in shown(chat)


def test_a_saved_conversation_names_its_files(chat: Chat, script: Script, red: Path, beep: Path) -> None:
    take_turn(chat, type_lines(f"'{red}' what?"))
    take_turn(chat, type_lines(f"{beep} and that?"))
    obey(chat, "/save one")
    saved = json.loads(Path("one.json").read_text())["messages"][0]["content"]
    assert saved[0]["path"] == str(red) and len(saved[0]["sha256"]) == 64 and saved[1]["text"] == "what?"
    before = chat.conversation.turns
    obey(chat, "/load one")
    again = chat.conversation.turns
    assert [turn.question for turn in again] == ["what?", "and that?"]
    for one, other in zip(before, again, strict=True):
        assert [each.medium.digest for each in one.media if each.medium] == [
            each.medium.digest for each in other.media if each.medium
        ]
    assert chat.conversation.ids() == Prompt() + chat.conversation.ids() and len(chat.conversation.ids().media) == 2


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_file_that_is_gone_or_changed_is_named(chat: Chat, script: Script, red: Path, how: str) -> None:
    take_turn(chat, type_lines(f"'{red}' what?"))
    obey(chat, "/save one")
    red.unlink()
    if how == "changed":
        save_picture(red, (0, 255, 0))
    shown(chat)
    obey(chat, "/load one")
    assert "red one.png is gone or has changed since; its question is read without it" in shown(chat)
    assert len(chat.conversation.ids().media) == 0
    obey(chat, "/save two")  # and is still named
    assert json.loads(Path("two.json").read_text())["messages"][0]["content"][0]["path"] == str(red)


def test_another_model_reads_the_files_again(
    chat: Chat, script: Script, red: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Smaller(CharTokenizer):
        media = MediaSettings(crop_size=56, max_crops=4, image_token=6, audio_token=7)

    model = chat.conversation.model
    monkeypatch.setattr("phi4_mlx.chat.session.load_shown", lambda screen, name, load: (model, tokenizers.pop(0)))
    take_turn(chat, type_lines(f"'{red}' what?"))
    tokenizers = [CharTokenizer(), Smaller(), CharTokenizer()]
    sizes = []
    for number in range(3):
        if number != 1:
            red.rename(red.with_suffix(".away"))
        shown(chat)
        obey(chat, "/model other")
        sizes.append([each.medium and each.medium.tokens for each in chat.conversation.turns[0].media])
        if number != 1:
            red.with_suffix(".away").rename(red)
    assert sizes == [[5], [13], [None]]  # kept as it is; read again; gone
    assert "red one.png is gone or has changed since" in shown(chat)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"},
        {"type": "image", "path": "/a.png"},
        {"type": "image", "path": "a.png", "sha256": "0" * 64},
        {"type": "image", "path": 1, "sha256": "0" * 64},
        {"type": "video", "path": "/a.png", "sha256": "0" * 64},
        {"type": "image", "path": "/a.png", "sha256": "0" * 64, "page": 0},
        {"type": "text", "text": "x"},
        "x",
        None,
    ],
)
def test_a_part_of_another_form_is_refused(chat: Chat, part: object) -> None:
    question = {"role": "user", "content": [part, {"type": "text", "text": "x"}]}
    Path("one.json").write_text(json.dumps({"messages": [question, {"role": "assistant", "content": ""}]}))
    with pytest.raises(RequestError, match=r"message 0: .* is not a picture or a sound with a path and its sha256"):
        obey(chat, "/load one")


def test_a_text_model_refuses_media_in_one_line(
    chat: Chat, script: Script, red: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_turn(chat, type_lines(f"'{red}' what?"))
    obey(chat, "/save one")
    monkeypatch.setattr(CharTokenizer, "media", None)
    for line in (f"/image {red}", "/audio x.wav", "/record", f"'{red}' what?", "/load one"):
        shown(chat)
        take_turn(chat, type_lines(line))
        text = shown(chat).replace("\n", " ")
        assert "reads only text; Phi-4-multimodal-instruct and the embedded demo-multimodal read" in text
    assert len(chat.conversation.turns) == 1


def test_a_conversation_with_media_does_not_go_on_with_a_text_model(chat: Chat, script: Script, red: Path) -> None:
    take_turn(chat, type_lines(f"'{red}' what?"))
    take_turn(chat, type_lines("/model demo"))
    text = shown(chat).replace("\n", " ")
    assert "that model reads only text;" in text and "/reset drops those of this conversation" in text
    assert chat.conversation.tokenizer.media is not None and len(chat.conversation.turns) == 1
    obey(chat, "/reset")
    obey(chat, "/model demo")
    assert chat.conversation.tokenizer.media is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image {beep}", "beep.wav is a sound, not a picture"),
        ("/audio {red}", "red one.png is a picture, not a sound"),
        ("/image {red} 2", "is not a PDF, and only a PDF has pages; leave out '2'"),
        ("/image none.png", "none.png cannot be read: No such file or directory"),
        ("/image re one.png", "red one.png?"),
        ("/audio .", "cannot be read: it is a folder, not a regular file"),
        ("/audio /dev/zero", "cannot be read: it is a device, not a regular file"),
    ],
)
def test_a_wrong_file_costs_a_line(chat: Chat, red: Path, beep: Path, line: str, message: str) -> None:
    take_turn(chat, type_lines(line.format(red=red, beep=beep)))
    assert message in shown(chat).replace("\n", " ") and chat.pending == []


def test_a_clip_longer_than_speech_names_transcribe(chat: Chat, tmp_path: Path) -> None:
    obey(chat, f"/audio {save_sound(tmp_path / 'talk.wav', 41)}")
    text = shown(chat).replace("\n", " ")
    assert "talk.wav: 41 seconds, 513 tokens" in text and "at most 40 s" in text and "transcribe" in text


def test_one_bad_file_in_a_line_attaches_none(chat: Chat, script: Script, red: Path, tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(red.read_bytes()[:40])
    take_turn(chat, type_lines(f"'{red}' {tmp_path}/half.png what?"))
    assert chat.pending == [] and questions(chat) == []


def test_reading_can_be_interrupted(chat: Chat, red: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("phi4_mlx.tokens.media.media_file.media_of_file", interrupt)
    take_turn(chat, type_lines(f"/image {red}"))
    assert chat.pending == []


def test_pages_of_a_pdf_are_pictures(chat: Chat, tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    import PIL.Image

    pages = [PIL.Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    pages[0].save(tmp_path / "a scan.pdf", save_all=True, append_images=pages[1:])
    for line, numbers in (
        ("/image 'a scan.pdf' 2-3", [2, 3]),
        ("/image a scan.pdf", [1, 2, 3]),
        ("/image a scan.pdf 3, 1", [3, 1]),
        (f"'{tmp_path}/a scan.pdf'", [1, 2, 3]),
    ):
        take_turn(chat, type_lines(line))
        assert [each.page for each in chat.pending] == numbers
        assert f"a scan.pdf, page {numbers[0]}: " in shown(chat)
        chat.pending.clear()
    take_turn(chat, type_lines("/image a scan.pdf 4"))
    assert "'4' is not in the PDF, whose pages are 1 to 3" in shown(chat).replace("\n", " ")
    take_turn(chat, type_lines("/audio a scan.pdf"))
    assert "is a PDF, not a sound" in shown(chat).replace("\n", " ")


def test_a_saved_page_is_read_again(chat: Chat, script: Script, tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    import PIL.Image

    PIL.Image.new("RGB", (40, 30), "red").save(tmp_path / "scan.pdf")
    take_turn(chat, type_lines(f"{tmp_path}/scan.pdf what?"))
    (before,) = chat.conversation.turns[0].media
    obey(chat, "/save one")
    obey(chat, "/load one")
    (after,) = chat.conversation.turns[0].media
    assert before.medium and after.medium and after.medium.digest == before.medium.digest
    assert (after.path, after.page, after.sha256) == (before.path, 1, before.sha256)

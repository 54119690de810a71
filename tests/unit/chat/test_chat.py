"""The chat without a terminal: commands, notes, Ctrl-C, and the file that a closed terminal leaves."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.chat import transcript
from phi4_mlx.chat.__main__ import HungUp, take_turn, talk
from phi4_mlx.chat.commands import COMMANDS, Leave, is_command, obey
from phi4_mlx.chat.conversation import Usage
from phi4_mlx.chat.session import Chat, rescued_file
from phi4_mlx.checkpoint import load
from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.options import SAMPLING
from tests.char_tokenizer import CharTokenizer
from tests.unit.chat.scripted import Script, questions, shown, type_lines


@pytest.mark.parametrize("line", ["/help", "/", "/nope", "/set temp 1"])
def test_a_word_after_a_slash_is_a_command(line: str) -> None:
    assert is_command(line)


@pytest.mark.parametrize("line", ["/etc/hosts is what?", " /help", "//", "1/2", "", "hello /help", "/Users"])
def test_other_slashes_are_text(line: str) -> None:
    assert not is_command(line)


def test_help_lists_every_command(chat: Chat) -> None:
    obey(chat, "/help")
    text = shown(chat)
    assert all(f"/{name}" in text for name in COMMANDS)


def test_an_unknown_command_costs_a_line(chat: Chat, script: Script) -> None:
    take_turn(chat, type_lines("/hlep"))
    assert shown(chat) == "/hlep is not a command; did you mean /help?\n\n"
    take_turn(chat, type_lines("/xyzzy"))
    assert "/xyzzy is not a command; /help lists them; a space before the slash makes it a message\n" in shown(chat)
    assert questions(chat) == []


def test_a_question_is_answered_and_kept(chat: Chat, script: Script) -> None:
    script.replies = ["Good day."]
    take_turn(chat, type_lines("hello"))
    assert shown(chat).startswith("Good day.\n")
    assert questions(chat) == ["hello"] and chat.conversation.turns[0].answer == "Good day."
    take_turn(chat, type_lines("  \n"))  # nothing was asked
    assert questions(chat) == ["hello"]


def test_a_cut_answer_says_how_to_get_more(chat: Chat, script: Script) -> None:
    script.finish_reason = "length"
    take_turn(chat, type_lines("hello"))
    assert "cut at 5 tokens; /set max-tokens N" in shown(chat)


@pytest.mark.parametrize("colour", [False, True])
def test_the_model_cannot_steer_the_terminal(colour: bool, chat: Chat, script: Script) -> None:
    chat.screen.colour = colour
    script.replies = ["a\x1b[2Jb\x07\x9bc\rd"]
    take_turn(chat, type_lines("hello"))
    assert shown(chat).removeprefix("\x1b[0m").startswith("a[2Jbcd\n")


def test_system_reset_undo_retry(chat: Chat, script: Script) -> None:
    read = type_lines("/system be brief", "one", "two", "/undo", "/retry", "/system", "/system -", "/reset", "/undo")
    for _ in range(3):
        take_turn(chat, read)
    assert chat.conversation.system == "be brief" and questions(chat) == ["one", "two"]
    take_turn(chat, read)
    assert questions(chat) == ["one"]
    script.replies = ["second thoughts"]
    take_turn(chat, read)
    assert questions(chat) == ["one"] and chat.conversation.turns[0].answer == "second thoughts"
    assert "temp is 0" in shown(chat)
    take_turn(chat, read)
    assert "be brief" in shown(chat)
    take_turn(chat, read)
    assert chat.conversation.system is None
    take_turn(chat, read)
    assert questions(chat) == []
    take_turn(chat, read)
    assert "there is no turn yet" in shown(chat)


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not command.words])
def test_a_command_without_words_refuses_words(chat: Chat, name: str) -> None:
    with pytest.raises(RequestError, match=f"/{name} takes nothing after it, not 'foo'"):
        obey(chat, f"/{name} foo")


def test_undo_takes_back_as_many_turns_as_it_is_told(chat: Chat, script: Script) -> None:
    read = type_lines("one", "two", "three", "four")
    for _ in range(4):
        take_turn(chat, read)
    for wrong in ("0", "5", "-1", "all", "1 2"):
        with pytest.raises(RequestError, match="/undo takes back 1 to 4 turns"):
            obey(chat, f"/undo {wrong}")
    obey(chat, "/undo 3")
    assert questions(chat) == ["one"]


def test_a_retry_stopped_before_its_first_token_keeps_the_old_answer(chat: Chat, script: Script) -> None:
    chat.answer("one")
    script.replies = [""]  # no token came
    obey(chat, "/retry")
    assert [turn.answer for turn in chat.conversation.turns] == ["reply"]


def test_save_and_load(chat: Chat, script: Script, tmp_path: Path) -> None:
    obey(chat, "/system be brief")
    chat.answer("one")
    obey(chat, "/save talk")
    saved = (tmp_path / "talk.json").read_text()
    chat.answer("two")
    obey(chat, "/save talk")  # the same conversation, continued
    assert (tmp_path / "talk.json").read_text() != saved
    obey(chat, "/reset")
    with pytest.raises(RequestError, match="exists"):  # another conversation
        obey(chat, "/save talk")
    (tmp_path / "talk.json").rename(tmp_path / "renamed")
    obey(chat, "/load renamed")
    assert questions(chat) == ["one", "two"] and chat.conversation.system == "be brief"
    chat.answer("three")


@pytest.mark.parametrize(
    ("typed", "file"),
    [
        ("my talk", "my talk.json"), ('"my talk"', "my talk.json"), ("'my talk.json'", "my talk.json"),
        (r"my\ talk", "my talk.json"), ("it's mine", "it's mine.json"), ("v1.2", "v1.2"), ("~/talk", "home/talk.json"),
        ("'~/a talk'", "home/a talk.json"), ("  talk  ", "talk.json"), ("notes.txt", "notes.txt"),
        (".talk", ".talk.json"), ("日本 語", "日本 語.json"),
    ],
)  # fmt: skip
def test_a_file_is_named_as_it_is_typed(typed: str, file: str, chat: Chat, script: Script, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    chat.answer("one")
    obey(chat, f"/save {typed}")
    assert (tmp_path / file).is_file()
    assert str(tmp_path / file) in shown(chat)
    chat.conversation.turns.clear()
    obey(chat, f"/load {typed}")
    assert questions(chat) == ["one"]


def test_conversations_of_two_names_have_two_prompt_caches(new_chat: Callable[..., Chat], tmp_path: Path) -> None:
    chat = new_chat(max_tokens=4)
    for name in ("v1.2", "v1.3"):
        chat.answer(name)
        obey(chat, f"/save {name}")
        assert (tmp_path / f"{name}.cache.safetensors").is_file()


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("/ reset", "is not a command"),
        ("/save", "needs the name of a file"),
        ("/save ~nobody/talk", "No such file"),
        ("/save no/such/folder/x", "No such file or directory"),
        ("/save a\0b", "null"),
        ("/load", "needs the name of a file"),
        ("/load nothing", "nothing does not exist"),
        ("/load brokn.json", "brokn.json does not exist; did you mean broken.json?"),
        ("/load brokn", "brokn does not exist; did you mean broken.json?"),
        ("/load broken.json", "is not a saved conversation: it is not JSON"),
        ("/load talk.cache.safetensors", "is not a saved conversation"),
        ("/set temp nan", "temp: 'nan' is not a number from 0 to 100"),
        ("/set max-tokens 0", "max-tokens: '0' is not a whole number from 1 to"),
        ("/set seed -1", "seed: '-1' is not a whole number from 0 to"),
        ("/set top-p 1.5", "top-p: '1.5' is not a number from 0 to 1"),
        ("/set temp 0.5 0.6", "temp: '0.5 0.6' is not a number"),
        ("/save folder", "'folder' is not the name of a file; give one"),
        ("/save folder/", "'folder/' is not the name of a file"),
        ("/save .", "'.' is not the name of a file"),
        ("/save ~", "is not the name of a file"),
        ('/save ""', "'' is not the name of a file"),
        ("/load folder", "'folder' is not the name of a file"),
        ("/set colour blue", "'colour' cannot be set; these can: temp, top-p"),
        ("/model no-such-folder", "neither a folder nor a Hub id"),
    ],
)
def test_a_mistake_costs_a_line_and_nothing_else(
    typed: str, complaint: str, chat: Chat, script: Script, tmp_path: Path
) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "folder").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "talk.cache.safetensors").write_bytes(b"\0\xff")
    chat.answer("one")
    settings, shown_before = dict(chat.settings), shown(chat)
    assert shown_before
    take_turn(chat, type_lines(typed))
    line = shown(chat)
    assert complaint in line and "\n" not in line.strip()
    assert questions(chat) == ["one"] and chat.settings == settings and chat.model_name == "demo"


def test_set_shows_and_changes_and_goes_back(chat: Chat, script: Script) -> None:
    obey(chat, "/set\tmax-tokens  7 ")
    chat.answer("one")
    assert script.options.max_tokens == 7
    obey(chat, "/set max-tokens -")
    assert chat.settings["max-tokens"] == 100
    sampler = chat.decode_options().sampler
    assert chat.decode_options().sampler is sampler  # a seed continues from answer to answer
    obey(chat, "/set temp 0.5")
    assert chat.decode_options().sampler is not sampler
    shown(chat)
    obey(chat, "/set")
    listed = shown(chat)
    assert all(name in listed for name in SAMPLING)
    obey(chat, "/set temp")
    assert re.fullmatch(r"temp +0\.5 .*\n\n", shown(chat))
    obey(chat, "/set seed -")
    assert "seed is not set" in shown(chat)


def test_stats_show_the_counts_of_an_answer(chat: Chat, script: Script) -> None:
    obey(chat, "/stats")
    assert "in 0 turns" in shown(chat)
    chat.answer("one")
    shown(chat)
    chat.conversation.usage.reprefilled = 4097
    obey(chat, "/stats")
    text = shown(chat)
    assert "in 1 turn\n" in text and "from the cache" in text and "tokens/s" in text and "RoPE table" in text
    assert "4,097 tokens run again" in text


def test_a_crossing_names_the_table_that_is_now_in_use(chat: Chat) -> None:
    model, tokenizer = load("demo")  # its boundary is at 256 tokens
    chat.conversation.switch(model, tokenizer)
    chat.set("max-tokens", 4)
    for question in ("hi", "The code of the blue door is 4711. " * 20):
        chat.answer(question)
    assert "now needs the RoPE table for long texts: " in shown(chat)
    obey(chat, "/undo")
    chat.answer("hi")
    assert "now needs the RoPE table for short texts: " in shown(chat)
    chat.answer("hi")
    assert "RoPE table" not in shown(chat)


def test_no_amount_of_one_has_a_plural(chat: Chat, script: Script, tmp_path: Path) -> None:
    script.replies = ["x"]
    chat.answer("one")
    chat.conversation.usage = Usage(1, 0, 1, 2.0, 2.0, 1, 0.000_001)
    obey(chat, "/stats")
    obey(chat, "/save one")
    obey(chat, "/undo 1")
    obey(chat, "/load one")
    text = shown(chat)
    assert "1 token:" in text and "1 token at" in text and "1.00 KB at the peak" in text and "1 turn from" in text
    assert not re.search(r"\b1 \w+s\b|\b0\.00? [MG]B", text)


def test_another_model_continues_the_conversation(
    chat: Chat, script: Script, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Any]
) -> None:
    import phi4_mlx.checkpoint

    chat.answer("one")
    other = tiny_model(seed=1)
    monkeypatch.setattr(phi4_mlx.checkpoint, "load", lambda name, **options: (other, CharTokenizer()))
    obey(chat, "/model other")
    assert chat.conversation.model is other and questions(chat) == ["one"] and chat.model_name == "other"


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(chat: Chat, script: Script) -> None:
    script.replies = ["a long answer", "next"]
    script.at_token = lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 3 else None
    before = signal.getsignal(signal.SIGINT)
    take_turn(chat, type_lines("one"))
    assert chat.conversation.turns[0].answer == "a l"
    assert shown(chat) == "a l\nstopped\n\n"
    assert signal.getsignal(signal.SIGINT) is before
    script.at_token = lambda number: None
    take_turn(chat, type_lines("two"))
    assert questions(chat) == ["one", "two"]


def test_ctrl_c_twice_does_not_wait_for_a_token(chat: Chat, script: Script) -> None:
    def press_twice(number: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    script.at_token = press_twice
    take_turn(chat, type_lines("one"))
    assert "Ctrl-D leaves" in shown(chat)


def test_ctrl_c_while_the_prompt_is_read(chat: Chat, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    reuse = chat.conversation.cache.reuse

    def press(ids: list[int]) -> list[int]:
        os.kill(os.getpid(), signal.SIGINT)
        return reuse(ids)

    monkeypatch.setattr(chat.conversation.cache, "reuse", press)
    take_turn(chat, type_lines("one"))
    assert questions(chat) == [] and shown(chat) == "stopped\n\n"


def test_a_long_prompt_shows_its_progress(chat: Chat, script: Script) -> None:
    chat.screen.colour = True
    script.prompt_length = 5000
    script.at_token = lambda number: script.progress(5000 if number == 1 else 100, 5000)
    chat.answer("one")
    before, after = shown(chat).split("\x1b[0m\r\x1b[K")  # the line is cleared again
    assert before == "\r\x1b[K\x1b[2mreading 0 of 5,000 tokens ..."
    assert "\r" not in after and "reply" in after  # a re-prefill in mid-answer does not write over it


def test_ctrl_c_at_the_prompt_says_how_to_leave(chat: Chat) -> None:
    take_turn(chat, type_lines(KeyboardInterrupt))
    assert shown(chat) == "Ctrl-D leaves\n"


def test_the_ways_to_leave(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Leave):
        obey(chat, "/quit")
    monkeypatch.setattr("sys.stdin", os.fdopen(os.openpty()[1]))
    with pytest.raises(Leave):
        take_turn(chat, type_lines(EOFError))
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    with pytest.raises(HungUp):  # the end of input, and the terminal is not there any more
        take_turn(chat, type_lines(EOFError))


@pytest.mark.parametrize("ending", [HungUp, OSError, ZeroDivisionError])
def test_a_closed_terminal_or_a_crash_keeps_the_conversation(
    ending: type[BaseException], chat: Chat, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Editor:
        def __init__(self, words: list[str], paths: dict[str, Any], colour: bool) -> None:
            self.read = type_lines("one", ending)

    monkeypatch.setattr("phi4_mlx.terminal.line_editor.LineEditor", Editor)
    with pytest.raises(ZeroDivisionError if ending is ZeroDivisionError else RequestError):
        talk(chat)
    rescued = rescued_file()
    assert transcript.load(rescued, chat.conversation.tokenizer)[1] == chat.conversation.turns

    chat.conversation.turns.clear()
    chat.greet()
    assert "/load brings it back" in shown(chat)
    obey(chat, "/load")
    assert questions(chat) == ["one"]
    chat.leave()  # on purpose, this time
    assert not rescued.exists()

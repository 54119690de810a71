"""Thoughts in the chat: apart from the answer on a terminal and in a pipe, and kept in the conversation."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.chat.commands import obey
from phi4_mlx.chat.session import MAX_TOKENS, Chat
from phi4_mlx.terminal.options import ADVISED
from phi4_mlx.terminal.screen import Screen
from tests.char_tokenizer import CharFormat, CharTokenizer
from tests.unit.chat.scripted import Script, questions, shown

REPLY = "<think>\nTwo *and* two.\n</think>\n\nIt is **4**."


@pytest.fixture
def reasoning(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Chat:
    monkeypatch.setattr(CharFormat, "reasons", True)
    return chat


@pytest.mark.parametrize(
    ("reply", "seen"),
    [
        (REPLY, "--- thinking ---\nTwo *and* two.\n--- answer ---\nIt is **4**.\n"),
        ("It is 4.", "It is 4.\n"),
        ("It </think> is <think>4</think>.", "It </think> is <think>4</think>.\n"),
        ("<think>never", "--- thinking ---\nnever\n"),
        ("<think></think>4", "4\n"),
    ],
)
def test_thoughts_have_lines_of_their_own(reply: str, seen: str, reasoning: Chat, script: Script) -> None:
    script.replies = [reply]
    reasoning.answer("2 + 2?")
    assert shown(reasoning).startswith(seen) and reasoning.conversation.turns[0].answer == reply


def test_thoughts_are_dim_and_cannot_steer_the_terminal(reasoning: Chat, script: Script) -> None:
    reasoning.screen.colour = True
    script.replies = ["<think>\x1b[2Jab</think>**c**"]
    reasoning.answer("2 + 2?")
    text = shown(reasoning)
    assert text.startswith("\x1b[2m--- thinking ---\n[\x1b[0m") and "\x1b[2Ja" not in text and "\x1b[2ma\x1b[0m" in text
    assert text.index("--- answer ---") < text.index("\x1b[1mc\x1b[0m")


def test_without_a_reasoning_format_tags_are_text(chat: Chat, script: Script) -> None:
    script.replies = [REPLY]
    chat.answer("2 + 2?")
    assert shown(chat).startswith(REPLY)


def test_a_pipe_receives_the_answer_alone(
    reasoning: Chat, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    piped = Chat(Screen(), reasoning.conversation, "demo", {"max-tokens": 100}, person=False, warn=told.append)
    script.replies = [REPLY, "<think>cut"]
    piped.answer("2 + 2?")
    assert capsys.readouterr() == ("It is **4**.\n", "--- thinking ---\nTwo *and* two.\n--- answer ---\n")
    script.finish_reason = "length"
    piped.answer("2 + 2?")
    assert capsys.readouterr() == ("", "--- thinking ---\ncut\n") and told == [
        "the thoughts were cut, before an answer, after 10 tokens; raise --max-tokens"
    ]


def test_thoughts_stay_in_the_conversation_and_its_file(
    reasoning: Chat, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt begins with the ids of the one before and of its answer, so that the cache serves them."""
    script.replies = [REPLY, "second"]
    reasoning.answer("2 + 2?")
    before = reasoning.conversation.ids()
    assert before == [3, *CharTokenizer().encode("2 + 2?"), 2, 4, *CharTokenizer().encode(REPLY)]
    assert reasoning.conversation.prompt_ids("and 3?")[: len(before)] == before
    obey(reasoning, f"/save {tmp_path / 'kept'}")
    obey(reasoning, "/undo")
    obey(reasoning, f"/load {tmp_path / 'kept'}")
    assert reasoning.conversation.ids() == before


def test_an_answer_that_is_stopped_in_its_thoughts_is_a_turn(reasoning: Chat, script: Script) -> None:
    def press(number: int) -> None:
        if number == 12:
            os.kill(os.getpid(), signal.SIGINT)

    script.replies, script.at_token = [REPLY, "4"], press
    reasoning.answer("one")
    assert "stopped" in shown(reasoning) and reasoning.conversation.turns[0].answer == REPLY[:12]
    script.at_token = lambda number: None
    reasoning.answer("two")
    assert shown(reasoning).startswith("4\n") and questions(reasoning) == ["one", "two"]


@pytest.mark.parametrize("name", ADVISED)
def test_a_model_has_its_authors_sampling(
    name: str, chat: Chat, new_chat: Callable[..., Chat], monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: dict[str, Any] = ADVISED[name]
    assert (chat.settings["temp"], chat.settings["top-p"], chat.settings["max-tokens"]) == (0, 1, 100)  # all given
    chat.greet()
    assert "max-tokens" not in shown(chat)
    monkeypatch.setattr(CharFormat, "name", name)
    other = Chat(chat.screen, chat.conversation, "demo", {"top-p": 0.5}, person=True)
    assert other.settings | advised | {"top-p": 0.5} == other.settings == other.defaults
    other.greet()
    assert f"temp {advised['temp']}, top-p 0.5, max-tokens 1,024; /set changes them." in shown(other)  # the context's
    obey(other, "/set temp 0")
    obey(other, "/set max-tokens 7")
    assert other.decode_options().max_tokens == 7
    obey(other, "/set max-tokens -")
    assert other.settings["max-tokens"] == 32_768 and other.settings["temp"] == 0
    monkeypatch.setattr(CharFormat, "name", "chars")
    monkeypatch.setattr("phi4_mlx.checkpoint.load", lambda *_, **__: (other.conversation.model, CharTokenizer()))
    obey(other, "/model demo")  # what was given or set stays, the rest is the new model's
    assert [other.settings[each] for each in ("temp", "top-p", "max-tokens")] == [0, 0.5, MAX_TOKENS]

"""Conversations with pictures and sounds under a tiny multimodal model: each answer is that of a fresh conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.agent import run_tools
from phi4_mlx.chat.__main__ import take_turn
from phi4_mlx.chat.commands import obey
from phi4_mlx.chat.conversation import Conversation
from phi4_mlx.chat.session import Chat
from phi4_mlx.checkpoint import load
from phi4_mlx.generation.stream import generate
from phi4_mlx.terminal.options import SAMPLING
from tests.tiny_multimodal import write_tiny_multimodal
from tests.unit.chat.scripted import Recorder, shown, type_lines
from tests.unit.chat.test_attachments import save_picture, save_sound

Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(write_tiny_multimodal(tmp_path_factory.mktemp("chat") / "model"))


@pytest.fixture
def chat(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    save_picture(tmp_path / "red.png")
    save_picture(tmp_path / "blue.png", (0, 0, 255))
    save_sound(tmp_path / "beep.wav")
    settings = {name: option.default for name, option in SAMPLING.items()} | {"max-tokens": 8}
    return Chat(Recorder(), Conversation(*loaded), "tiny", settings, person=True)


def fresh(chat: Chat) -> list[tuple[int, ...]]:
    """The answers to the same questions, each from an empty cache."""
    answers, (model, tokenizer) = [], (chat.conversation.model, chat.conversation.tokenizer)
    for count in range(len(chat.conversation.turns)):
        again = Conversation(model, tokenizer, turns=chat.conversation.turns[:count])
        turn = chat.conversation.turns[count]
        for _ in again.ask(turn.question, chat.decode_options(), turn.media):
            pass
        answers.append(again.turns[-1].ids)
    return answers


def test_each_answer_is_that_of_a_fresh_conversation(chat: Chat, loaded: Loaded) -> None:
    lines = ["hello", f"{Path.cwd()}/red.png what?", "and now?", "/undo", f"{Path.cwd()}/beep.wav hm?", "/retry", "so?"]
    for line in lines:
        take_turn(chat, type_lines(line))
    turns = chat.conversation.turns
    assert [len(turn.media) for turn in turns] == [0, 1, 1, 0]
    assert [turn.ids for turn in turns] == fresh(chat)
    assert chat.conversation.usage.cached_tokens > sum(each.tokens for turn in turns for each in turn.media)
    parts = [{"type": "image", "path": "red.png"}, {"type": "text", "text": "what?"}]
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": parts}])
    first = generate(model, tokenizer, prompt, max_tokens=8)
    obey(chat, "/reset")
    take_turn(chat, type_lines(f"{Path.cwd()}/red.png what?"))
    assert chat.conversation.turns[0].answer == first


def test_two_pictures_of_one_size_are_two_questions(chat: Chat) -> None:
    for name in ("red", "blue"):
        take_turn(chat, type_lines(f"{Path.cwd()}/{name}.png what?"))
        obey(chat, "/undo")
        assert chat.conversation.usage.cached_tokens < 8


def test_a_loaded_conversation_goes_on_from_its_cache(chat: Chat) -> None:
    take_turn(chat, type_lines(f"{Path.cwd()}/red.png what?"))
    obey(chat, "/save one")
    take_turn(chat, type_lines("and?"))
    expected = chat.conversation.turns[1].ids
    obey(chat, "/reset")
    shown(chat)
    obey(chat, "/load one")
    assert "with the prompt cache of" in shown(chat).replace("\n", " ")
    take_turn(chat, type_lines("and?"))
    assert chat.conversation.turns[1].ids == expected
    assert chat.conversation.usage.cached_tokens > chat.conversation.turns[0].media[0].tokens


def test_a_question_about_what_a_text_cannot_hold_is_refused(chat: Chat) -> None:
    save_sound(Path("long.wav"), 120)  # 1,500 tokens, and the context holds 1,024
    take_turn(chat, type_lines("/audio long.wav"))
    take_turn(chat, type_lines("what?"))
    assert "and the context holds 1,024" in shown(chat).replace("\n", " ")
    assert chat.conversation.turns == [] and len(chat.pending) == 1


def test_the_tool_loop_reads_media(chat: Chat, loaded: Loaded) -> None:
    model, tokenizer = loaded
    parts = [{"type": "audio", "path": "beep.wav"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": parts}]
    result = run_tools(model, tokenizer, messages, [], max_tokens=8)
    assert result.text == generate(model, tokenizer, tokenizer.apply_chat_template(messages), max_tokens=8)
    assert result.messages[0] == messages[0]

"""The prompt cache that `/save` writes and `/load` reads: no failure of it costs the conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.agent import Round
from phi4_mlx.chat.commands import obey
from phi4_mlx.chat.conversation import Turn, reply_ids
from phi4_mlx.chat.session import Chat
from phi4_mlx.generation import prompt_cache_content
from phi4_mlx.models.cache import CacheOptions
from phi4_mlx.tools.calls import ToolCall
from tests.char_tokenizer import CharTokenizer
from tests.unit.chat.scripted import Recorder

SILENT = 7  # a token without text: encoding an answer again does not bring it back


def drawn_turn(question: str, answer: str, rounds: tuple[Round, ...] = ()) -> Turn:
    return Turn(question, answer, (SILENT, *CharTokenizer().encode(answer)), rounds)


def remember(chat: Chat, *turns: Turn) -> None:
    """Sets the turns and caches their ids, as if the model had just drawn them."""
    conversation = chat.conversation
    conversation.turns = list(turns)
    conversation.forget_cache()
    mx.eval(conversation.model(mx.array([conversation.ids()]), conversation.cache))


def last_note(chat: Chat, command: str) -> str:
    assert isinstance(chat.screen, Recorder)
    chat.screen.notes.clear()
    obey(chat, command)
    return chat.screen.notes[0]


def test_the_next_prompt_continues_the_saved_cache(new_chat: Callable[..., Chat], tmp_path: Path) -> None:
    first, second = new_chat(max_tokens=4), new_chat(max_tokens=4)
    first.conversation.system = "be brief"
    remember(first, drawn_turn("one", "two"), drawn_turn("three", "four"))
    note = last_note(first, "/save talk")
    assert "saved 2 turns" in note and re.search(r"to talk.cache.safetensors, \d+\.\d KB", note)
    assert "with the prompt cache of" in last_note(second, "/load talk")
    assert second.conversation.turns == first.conversation.turns  # the tokens without text too
    history = second.conversation.ids()
    for chat in (first, second):
        chat.answer("five")
        usage = chat.conversation.usage
        assert usage.cached_tokens == len(history) and usage.prompt_tokens == len(history) + 8
    assert second.conversation.turns == first.conversation.turns


def test_an_older_cache_of_a_turn_taken_back_is_removed(
    new_chat: Callable[..., Chat], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    kept = tmp_path / "talk.cache.safetensors"
    for failing in (False, True):
        chat = new_chat(max_tokens=4)
        remember(chat, drawn_turn("one", "a secret"), *([drawn_turn("two", "three")] if failing else []))
        last_note(chat, "/save talk")
        assert kept.exists()
        for _ in chat.conversation.turns.copy():
            obey(chat, "/undo")
        if failing:
            remember(chat, drawn_turn("five", "six"))
        with monkeypatch.context() as patch:
            patch.setattr(prompt_cache_content, "TensorWriter", full)
            last_note(chat, "/save talk")
        assert not kept.exists()
        (tmp_path / "talk.json").unlink()


def test_no_failure_costs_the_conversation(
    new_chat: Callable[..., Chat], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = new_chat(max_tokens=4)
    remember(chat, drawn_turn("one", "two"))

    def full(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prompt_cache_content, "TensorWriter", full)
        note = last_note(chat, "/save talk")
    assert note.startswith("saved 1 turn to") and note.endswith("/load will prefill again: No space left on device")
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]
    assert last_note(new_chat(max_tokens=4), "/load talk").endswith("talk.json")
    assert "talk.cache.safetensors" in last_note(chat, "/save talk")  # there is room again

    other = new_chat(seed=1, max_tokens=4)
    assert "the next prompt is prefilled again: " in (note := last_note(other, "/load talk"))
    assert "was made with another model" in note and "\n" not in note
    kept = tmp_path / "talk.cache.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1])
    assert "is damaged" in last_note(new_chat(max_tokens=4), "/load talk")
    obey(chat, "/save talk")
    fewer = new_chat(max_tokens=4)
    fewer.conversation.cache_options = CacheOptions(max_kv_size=600)
    assert "another --kv-bits or --max-kv-size" in last_note(fewer, "/load talk")
    for each in (other, chat, fewer):
        each.answer("three")
        assert [turn.question for turn in each.conversation.turns] == ["one", "three"]


def test_a_turn_taken_back_is_not_saved(new_chat: Callable[..., Chat]) -> None:
    chat = new_chat(max_tokens=4)
    remember(chat, drawn_turn("one", "two"), drawn_turn("secret", "four"))
    obey(chat, "/undo")
    obey(chat, "/save talk")
    loaded = new_chat(max_tokens=4)
    obey(loaded, "/load talk")
    assert loaded.conversation.cache.ids[0].tolist() == loaded.conversation.ids()
    obey(chat, "/undo")
    assert "cache" not in last_note(chat, "/save talk")


def test_a_cache_that_has_dropped_tokens_is_not_saved_and_stays(new_chat: Callable[..., Chat]) -> None:
    chat = new_chat(max_tokens=4)
    conversation = chat.conversation
    conversation.turns = [drawn_turn("one", "x" * 700)]
    conversation.cache = conversation.model.make_cache(max_kv_size=512)
    ids = conversation.ids()
    for part in (ids[:500], [*ids[500:], 2]):  # an end marker, which no turn keeps
        mx.eval(conversation.model(mx.array([part]), conversation.cache))
    assert "has dropped its oldest tokens" in last_note(chat, "/save talk")
    assert conversation.cache.offset == len(ids) + 1


def test_only_the_edited_reply_of_a_file_is_encoded_again(new_chat: Callable[..., Chat], tmp_path: Path) -> None:
    chat = new_chat(max_tokens=4)
    called = ToolCall("add", {"x": 1})
    drawn = [SILENT, *reply_ids(CharTokenizer(), "let me see", [called])]  # type: ignore[arg-type]
    calls = Round("let me see", drawn, [called], ["3"])
    remember(chat, drawn_turn("one", "two"), drawn_turn("three", "four"), drawn_turn("five", "six", (calls,)))
    obey(chat, "/save talk")
    path = tmp_path / "talk.json"
    content = json.loads(path.read_text())
    content["messages"][3]["content"] = "FOUR"
    path.write_text(json.dumps(content))
    loaded = new_chat(max_tokens=4)
    obey(loaded, "/load talk")
    conversation = loaded.conversation
    assert [turn.answer for turn in conversation.turns] == ["two", "FOUR", "six"]
    assert conversation.turns[0] == chat.conversation.turns[0]
    assert conversation.turns[2] == chat.conversation.turns[2]
    assert conversation.turns[1].ids == tuple(CharTokenizer().encode("FOUR"))
    loaded.answer("next")
    assert conversation.usage.cached_tokens == len("one") + len("two") + len("three") + 8

"""A conversation as a file: complete or absent, and checked when it is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.agent import Round
from phi4_mlx.chat import transcript
from phi4_mlx.chat.commands import obey
from phi4_mlx.chat.conversation import Turn, reply_ids
from phi4_mlx.chat.session import Chat
from phi4_mlx.checkpoint import load_tokenizer_and_format
from phi4_mlx.errors import RequestError
from phi4_mlx.tools.calls import ToolCall
from tests.conftest import DATA


class Encoder:
    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


TOKENIZER: Any = Encoder()
TINY: Any = load_tokenizer_and_format(DATA / "tiny_tokenizer")
CALLED = b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null, "tool_calls": %b}]}'
TURNS = [Turn("a\nquestion é", "ab", (97, 98)), Turn("<|end|><|system|>", "", ())]


def test_a_saved_conversation_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    transcript.save(path, "demo", "be brief", TURNS)
    assert transcript.load(path, TOKENIZER) == ("be brief", TURNS)
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["messages"][1] == {"role": "user", "content": "a\nquestion é"}


def test_calls_of_tools_are_saved_and_loaded_as_the_model_would_write_them(tmp_path: Path) -> None:
    calls = [ToolCall("add", {"a": "<|end|>é"}), ToolCall("add", {"a": 2})]
    each = Round("so", reply_ids(TINY, "so", calls), calls, ["<|end|>", "error: no"])
    last = Turn("q", "done", tuple(TINY.encode("done")), (each, each))
    path = tmp_path / "talk.json"
    transcript.save(path, "demo", None, [last, Turn("stopped", "", (), (each,))])
    assert transcript.load(path, TINY) == (None, [last, Turn("stopped", "", (), (each,))])

    messages = json.loads(path.read_text())["messages"]
    assert [m["role"] for m in messages[:5]] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [m["tool_call_id"] for m in messages[2:4]] == ["call_1", "call_2"]
    rendered = TINY.apply_chat_template(messages[:2], add_generation_prompt=True)
    asked = TINY.apply_chat_template(messages[:1])
    assert rendered[len(asked) : -2] == each.ids  # without <|end|> and <|assistant|>

    messages[2:4] = messages[3], messages[2]  # the order of another program
    assert transcript.from_messages(messages, TINY) == (None, [last, Turn("stopped", "", (), (each,))])
    del messages[2]["tool_call_id"], messages[3]["tool_call_id"]
    _, turns = transcript.from_messages(messages, TINY)
    assert turns[0].rounds[0].results == ["error: no", "<|end|>"]


def test_a_conversation_without_system_prompt_or_turns(tmp_path: Path) -> None:
    transcript.save(tmp_path / "talk.json", "demo", None, [])
    assert transcript.load(tmp_path / "talk.json", TOKENIZER) == (None, [])


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text("precious")
    with pytest.raises(RequestError, match="exists"):
        transcript.save(path, "demo", None, TURNS)
    assert path.read_text() == "precious"
    transcript.save(path, "demo", None, TURNS, replace=True)
    assert transcript.load(path, TOKENIZER) == (None, TURNS)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.json"
    path.write_text("precious")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        transcript.save(path, "demo", None, TURNS, replace=True)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["talk.json"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\xff", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "has no 'messages'"),
        (b"{}", "has no 'messages'"),
        (b'{"messages": {}}', "are not a list"),
        (b'{"messages": ["hi"]}', "message 0 has no 'content'"),
        (b'{"messages": [{"role": "user"}]}', "message 0 has no 'content'"),
        (b'{"messages": [{"role": "user", "content": 5}]}', "message 0 has no 'content'"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "message 0 has no 'content'"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "it must be 'user'"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "has no answer"),
        (b'{"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}]}', "must be 'assistant'"),
        (CALLED % b'"x"', "message 1 has 'tool_calls' other than names"),
        (CALLED % b'[{"function": {"name": "x", "arguments": "["}}]', "message 1 has 'tool_calls'"),
        (CALLED % b'[{"function": {"name": "x", "arguments": "[]"}}]', "message 1 has 'tool_calls'"),
        (CALLED % b'[{"function": {"name": "x", "arguments": {"a": "\\ud800"}}}]', "message 1 has 'tool_calls'"),
        (CALLED % b'[{"id": [], "function": {"name": "x", "arguments": {}}}]', "a call of a tool, and has no result"),
        (b'{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}', "'system'"),
    ],
)
def test_other_files_are_refused_in_one_line(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=complaint) as refused:
        transcript.load(path, TOKENIZER)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_folders_pipes_and_enormous_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(RequestError, match=r"cannot be read: it is .*, not a regular file"):
            transcript.load(path, TOKENIZER)
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(transcript.LARGEST_FILE + 1)
    with pytest.raises(RequestError, match="bytes"):
        transcript.load(large, TOKENIZER)


@pytest.mark.parametrize("name", ["talk.json", "older.json", "talk.cache.safetensors", "older.cache.safetensors"])
def test_saving_removes_what_a_killed_chat_left(name: str, chat: Chat, tmp_path: Path) -> None:
    left = tmp_path / f".{name}.999999999-0.partial"  # no process has this number
    left.write_text("half")
    obey(chat, "/save talk")
    assert (tmp_path / "talk.json").exists() and not left.exists()

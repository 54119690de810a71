"""The history of the line editor: any bytes in its file, and any message, without a failure or a wait."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from phi4_mlx.terminal import line_editor


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(line_editor, "state_folder", lambda: tmp_path)
    return tmp_path


def history(folder: Path) -> Any:
    """The history of a new program."""
    return line_editor._History(folder / "history")


@pytest.mark.parametrize(
    "message",
    [
        "one line", "several\nlines\n\nof text\n", "<|end|><|user|>", "\x1b[2J\x07\x00\x7f", "+", "# 2026", "\n+\n#",
        "\r\n",        "a\u2028b\x85c\x0cd", "\U0001f600é", "x" * 200_000, "",
    ],
    ids=lambda message: ascii(message)[:20],
)  # fmt: skip
def test_a_message_comes_back_as_it_was(message: str, folder: Path) -> None:
    history(folder).store_string("before")
    history(folder).store_string(message)
    assert list(history(folder).load_history_strings()) == [message, "before"]
    assert (folder / "history").stat().st_mode & 0o777 == 0o600


def test_half_a_surrogate_pair_is_a_question_mark(folder: Path) -> None:
    history(folder).store_string("a\udcffb\ud800")
    assert list(history(folder).load_history_strings()) == ["a?b?"]


@pytest.mark.parametrize(
    "data", [b"\xff\xfe\x00", b"+\xff\n", b"\n# x\n+good\n+\xf0\x9f\n", bytes(range(256)) * 50, b""]
)
def test_any_bytes_are_read(data: bytes, folder: Path) -> None:
    (folder / "history").write_bytes(data)
    for message in history(folder).load_history_strings():
        assert message.encode()


def test_of_a_long_file_the_end_is_read(folder: Path) -> None:
    with open(folder / "history", "wb") as file:
        file.truncate(2**33)  # 8 GB of NUL
    history(folder).store_string("new")
    assert list(history(folder).load_history_strings()) == ["new"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("my talk.json", "my talk.cache", "other.json", ".hidden", "deep folder/one.json", "home/at home.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        ("/l", ["/load "]), ("/s", ["/set ", "/save "]), ("/set ", ["/set temp ", "/set top-p "]), ("/x", []),
        ("/set t", ["/set temp ", "/set top-p "]), ("l", []), (" /l", []), ("/quit", ["/quit"]), ("/quit ", []),
        ("/load o", ["/load other.json"]), ("/load my", ["/load my talk.json"]), ("/load my t", ["/load my talk.json"]),
        ('/load "my t', ['/load "my talk.json"']), ("/load 'de", ["/load 'deep folder/"]), ("/load x", []),
        (r"/load my\ t", ["/load my talk.json"]), ("/load deep folder/", ["/load deep folder/one.json"]),
        ("/load ~/", ["/load ~/at home.json"]), ("/load ~", ["/load ~/at home.json"]), ("/load no/such/", []),
        ("/load .", ["/load .hidden"]), ("/model ", ["/model deep folder/", "/model home/"]), ("/load a\0", []),
        ("/load {}/o", ["/load {}/other.json"]), ("/load ~nobody/", []), ("hello /load o", []),
    ],
)  # fmt: skip
def test_tab_completes_commands_and_file_names(typed: str, lines: list[str], files: Path) -> None:
    words = ["/load ", "/set ", "/save ", "/model ", "/quit", "/set temp ", "/set top-p "]
    paths = {"/load": lambda name: not name.endswith(".cache"), "/model": lambda name: False}
    completer = line_editor.CommandCompleter(words, paths)
    document = Document(typed.format(files))
    found = list(completer.get_completions(document, CompleteEvent()))
    completed = [document.text[: len(document.text) + each.start_position] + each.text for each in found]
    assert completed == [line.format(files) for line in lines]


def test_a_pipe_or_a_missing_folder_is_an_empty_history(folder: Path) -> None:
    os.mkfifo(folder / "history")
    assert list(history(folder).load_history_strings()) == []
    (folder / "file").write_text("")
    lost = line_editor._History(folder / "file" / "history")
    lost.store_string("x")
    assert list(lost.load_history_strings()) == []

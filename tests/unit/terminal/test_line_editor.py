"""The history of the line editor: any bytes in its file, and any message, without a failure or a wait."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

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


def test_a_pipe_or_a_missing_folder_is_an_empty_history(folder: Path) -> None:
    os.mkfifo(folder / "history")
    assert list(history(folder).load_history_strings()) == []
    (folder / "file").write_text("")
    lost = line_editor._History(folder / "file" / "history")
    lost.store_string("x")
    assert list(lost.load_history_strings()) == []

"""The microphone, with a stand-in for sounddevice: Enter ends a recording, and what is missing costs a line."""

from __future__ import annotations

import os
import stat
import sys
import types
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from phi4_mlx.chat import microphone
from phi4_mlx.chat.__main__ import take_turn
from phi4_mlx.chat.session import Chat
from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.prompt import MediaSettings
from tests.char_tokenizer import CharTokenizer
from tests.unit.chat.scripted import shown, type_lines

HALF_A_SECOND = bytes(range(250)) * 64  # 8,000 samples


class Stream:
    """A stream that calls back with two blocks once it is started."""

    def __init__(self, callback: Callable[..., object], **options: Any) -> None:
        assert options == {"samplerate": 16_000, "channels": 1, "dtype": "int16"}
        self._callback = callback

    def start(self) -> None:
        for _ in range(2):
            self._callback(memoryview(HALF_A_SECOND), 8000, None, None)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("sounddevice")
    module.PortAudioError = type("PortAudioError", (Exception,), {})  # type: ignore[attr-defined]
    module.RawInputStream = type("Made", (Stream,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    return module


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[IO[str]]:
    """A file for the keys that the person presses."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin, os.fdopen(writing, "w") as typed:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield typed


def press_enter(keyboard: IO[str]) -> None:
    keyboard.write("\n")
    keyboard.flush()


def test_enter_ends_a_recording(device: Any, keyboard: IO[str], tmp_path: Path) -> None:
    shown: list[float] = []
    press_enter(keyboard)
    path = microphone.record(tmp_path / "recordings", shown.append)
    with wave.open(str(path)) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (16_000, 1, 2)
        assert sound.readframes(99_999) == HALF_A_SECOND * 2
    assert shown[-1] == 1.0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_recording_ends_at_the_longest_sound(
    device: Any, keyboard: IO[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microphone, "LONGEST_S", 1)
    assert microphone.record(tmp_path, lambda seconds: None).exists()


def test_ctrl_c_drops_a_recording(device: Any, keyboard: IO[str], tmp_path: Path) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        microphone.record(tmp_path / "recordings", interrupt)
    assert not (tmp_path / "recordings").exists()


def test_a_silent_device_is_named(
    device: Any, keyboard: IO[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream, "start", lambda self: None)
    press_enter(keyboard)
    with pytest.raises(RequestError, match="nothing was recorded"):
        microphone.record(tmp_path, lambda seconds: None)


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(RequestError, match=r"/record needs the package sounddevice: pip install 'sounddevice>=0.5'"):
        microphone.record(tmp_path, lambda seconds: None)


@pytest.mark.parametrize("step", ["__init__", "start"])
def test_a_missing_microphone_costs_a_line(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **options: Any) -> None:
        raise device.PortAudioError("Error querying device -1")

    monkeypatch.setattr(Stream, step, fail)
    with pytest.raises(RequestError, match="no microphone that can be recorded from: Error querying device -1"):
        microphone.record(tmp_path, lambda seconds: None)


def test_a_recording_is_attached(
    chat: Chat, device: Any, keyboard: IO[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(CharTokenizer, "media", MediaSettings(28, 4, 6, 7))
    press_enter(keyboard)
    take_turn(chat, type_lines("/record"))
    assert "1 second, 13 tokens" in shown(chat) and len(chat.pending) == 1
    assert chat.pending[0].path.startswith(str(tmp_path))

"""Sound files and arrays: what is read, as what, and what is refused in one line."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media.audio import LONGEST_S, read_audio
from phi4_mlx.tokens.media.sound_file import open_sound
from phi4_mlx.tokens.media.sound_reader import without_decoder_notes
from tests.unit.tokens.media.odd_sounds import RATE, REFUSED, SECONDS, TAKEN, encoded, tone, without_count


@pytest.fixture(autouse=True)
def no_converter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty PATH: macOS would convert m4a."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize("name", TAKEN)
def test_an_odd_sound_is_heard_as_it_is(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    audio = read_audio(TAKEN[name]())
    expected = read_audio((tone(), RATE))
    assert audio.seconds == pytest.approx(SECONDS, abs=1.5 / RATE)
    assert audio.features.shape == expected.features.shape
    seen, right = audio.features[5:-5], expected.features[5:-5]
    loud = right > right.max() - 1  # the bands of the tones, which lossy kinds keep too
    assert np.abs(seen - right)[loud].max() < 0.1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_sound_is_refused_in_one_line(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    made, words = REFUSED[name]
    with pytest.raises(RequestError, match=words) as refusal:
        read_audio(made())
    assert str(refusal.value).startswith("the sound ") and len(str(refusal.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")  # neither the decoder's notes, nor a traceback of a callback


@pytest.mark.parametrize("name", ["sound.wav", "sound.raw", "sound.png", "sound", "Ton für dich.mp3"])
def test_the_content_decides_not_the_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(encoded("FLAC"))
    expected = read_audio(encoded("FLAC")).digest
    assert read_audio(path).digest == read_audio(str(path)).digest == expected


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path, words in (
            (tmp_path, "it is a folder"),
            (tmp_path / "pipe", "it is a pipe"),
            (tmp_path / "socket", "it is a socket"),
            (Path("/dev/zero"), "it is a device"),
            (tmp_path / "missing.wav", "No such file"),
            (Path("a\0b"), "NUL"),
        ):
            with pytest.raises(RequestError, match=words):
                read_audio(path)


@pytest.mark.parametrize(
    ("wave", "expected"),
    [
        (tone().astype(np.float32), tone()),
        (tone().tolist(), tone()),
        (np.round(tone() * 2**15).astype(np.int16), tone()),
        (np.round(tone() * 2**31).astype(np.int32), tone()),
        (np.round(tone() * 128 + 128).astype(np.uint8), tone()),
        (np.stack([tone(), 0 * tone()], axis=1), tone() / 2),
        (tone()[:, None], tone()),
        (30 * tone(), 30 * tone()),  # loud
    ],
    ids=["float32", "a list", "int16", "int32", "uint8", "two channels", "one channel", "loud"],
)
def test_arrays(wave: object, expected: np.ndarray) -> None:
    seen, right = read_audio((wave, RATE)).features, read_audio((expected, RATE)).features
    assert np.abs(seen - right)[right > 15].max() < 0.1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ((RATE, tone()), "with the samples first"),
        ((tone(),), r"must be \(samples, rate"),
        ((tone(), None), "whole number of Hz"),
        ((tone(), "16000"), "whole number of Hz"),
        ((tone(), 16000.5), "whole number of Hz"),
        ((tone(), float("nan")), "whole number of Hz"),
        ((tone(), True), "whole number of Hz"),
        ((tone(), -16000), "-16,000 Hz"),
        ((tone(), 7000), "7,000 Hz"),
        ((np.zeros((2, 3, 4)), RATE), r"not \[2, 3, 4\]"),
        ((np.zeros((2, 16000)), RATE), r"\[n, channels\], up to 64, not \[2, 16000\]"),
        ((np.zeros((100, 0)), RATE), "0 channels"),
        ((np.zeros(0), RATE), "0 samples"),
        ((np.zeros(1000, dtype=np.int64), RATE), "not int64"),
        ((np.zeros(1000, dtype=bool), RATE), "not bool"),
        ((np.zeros(1000, dtype=complex), RATE), "not complex128"),
        ((["a", "b"], RATE), "samples must be"),
        (([[1.0], [1.0, 2.0]], RATE), "samples must be"),
        ((np.array([0.0] * 999 + [np.nan]), RATE), "NaN"),
        (17, "not int"),
        (None, "not NoneType"),
        ("https://example.com/a.wav", "is not fetched"),
    ],
)
def test_what_is_no_sound_is_refused(source: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_audio(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [1, -1], ids=["silence first", "noise first"])
def test_an_mp3_that_does_not_tell_its_length_is_read_to_its_end(order: int) -> None:
    """The decoder guesses it from the first frames, which are much shorter or longer than the others here."""
    import io

    import soundfile

    wave = np.concatenate([np.zeros(RATE * 2), 0.3 * np.random.default_rng(0).normal(size=RATE * 4)])[::order]
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE, 1, format="MP3", bitrate_mode="VARIABLE", compression_level=0.3) as mp3:
        mp3.write(wave)
    assert read_audio(without_count(file.getvalue())).seconds == pytest.approx(6, abs=0.15)


def test_mp3_files_one_behind_the_other_are_read_to_the_end() -> None:
    one = encoded("MP3")
    assert read_audio(one + one).seconds == pytest.approx(2 * SECONDS, abs=0.15)


def test_a_limit_holds_before_features_are_computed() -> None:
    for data in (encoded(), TAKEN["a FLAC of unknown size"](), (tone(), RATE)):
        with open_sound(data, SECONDS) as sound:
            assert sound.seconds == SECONDS
            assert sum(map(len, sound.blocks())) == RATE * SECONDS
        with pytest.raises(RequestError, match="phi4-mlx transcribe"), open_sound(data, SECONDS - 0.1):
            pass
    assert LONGEST_S == 1800


def test_blocks_are_of_limited_size_and_stop_when_nobody_reads() -> None:
    """Three hours in half a megabyte: only what is asked for is decoded."""
    with open_sound(encoded("FLAC", wave=np.zeros(8000 * 600), rate=8000)) as sound:
        blocks = sound.blocks()
        assert sound.seconds == 600 and len(next(blocks)) <= 2**16


def test_notes_of_the_decoder_are_not_printed_and_other_lines_are(capfd: pytest.CaptureFixture[str]) -> None:
    read_audio(encoded("MP3", wave=tone() + 0.05 * np.random.default_rng(0).normal(size=len(tone()))))
    assert capfd.readouterr().err == ""
    with without_decoder_notes():
        os.write(2, b"[src/libmpg123/parse.c:1] error: a note\na line of another thread\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "a line of another thread\n"


def test_m4a_is_converted_by_the_converter_of_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\0\0\0\x20ftypM4A " + bytes(99)
    made = tmp_path / "sound.caf"
    made.write_bytes(encoded("CAF"))
    converter = tmp_path / "afconvert"
    converter.write_text(f'#!/bin/sh\n[ "$1 $2 $3 $4" = "-f caff -d LEI16" ] && /bin/cp "{made}" "$6"\n')
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_audio(data).digest == read_audio(encoded("CAF")).digest
    converter.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(RequestError, match="afconvert refuses it"):
        read_audio(data)

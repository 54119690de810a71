"""`transcribe`: files to transcripts, where they are written, and how a stopped run goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

import phi4_mlx.transcription.transcriber as transcriber
from phi4_mlx.cli import main
from phi4_mlx.transcription.parts import LONGEST_S, Part
from phi4_mlx.transcription.transcriber import Answer
from tests.tiny_multimodal import write_tiny_multimodal

RATE = 8_000
LONG_S = 130.0


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise of 2 s with pauses of 0.5 s between."""
    wave = 0.1 * np.random.default_rng(seed).normal(size=round(seconds * RATE))
    for pause in np.arange(2, seconds, 2.5):
        wave[round(pause * RATE) : round((pause + 0.5) * RATE)] = 0
    return wave


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "talk.wav"
    soundfile.write(path, speech(LONG_S), RATE)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_multimodal(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """The parts that the model is asked about; its answers tell their times, and come in the wrong order."""
    parts: list[Part] = []

    def answers(model: object, tokenizer: object, given: Iterable[Part], task: str) -> Iterator[Answer]:
        held: list[Part] = []
        for part in given:
            parts.append(part)
            held.insert(0, part)
            if len(held) == 3:
                yield from (Answer(each, f"From {each.start:.1f}.", cut=False) for each in held)
                held = []
        yield from (Answer(each, f"From {each.start:.1f}.", cut=False) for each in held)

    monkeypatch.setattr(transcriber, "answers", answers)
    return parts


def transcribe(*words: object) -> int:
    return main(["transcribe", *map(str, words)])


def test_a_long_file_is_cut_and_its_text_is_in_order(sound, model, heard, capsys) -> None:
    assert transcribe(sound, "--model", model) == 0
    out, err = capsys.readouterr()
    assert len(heard) >= 4 and all(part.end - part.start <= LONGEST_S for part in heard)
    assert out == " ".join(f"From {part.start:.1f}." for part in heard) + "\n"
    assert err == ""


def test_verbose_json_has_times_duration_and_language(sound, model, heard, capsys) -> None:
    assert transcribe(sound, "--model", model, "--format", "verbose_json", "--language", "de") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["duration"], found["language"]) == (LONG_S, "german")
    times = [(round(part.start, 3), round(part.end, 3)) for part in heard]
    assert [(each["start"], each["end"]) for each in found["segments"]] == times


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("json", "talk.json"),
        ("text", "talk.txt"),
        ("srt", "talk.srt"),
        ("vtt", "talk.vtt"),
        ("verbose_json", "talk.json"),
    ],
)
def test_a_folder_gets_a_file_for_each_sound(tmp_path, sound, model, heard, form, name) -> None:
    soundfile.write(tmp_path / "short.flac", speech(1.5), RATE)
    folder = tmp_path / "new"
    assert transcribe(sound, tmp_path / "short.flac", "--model", model, "--format", form, "--output", folder) == 0
    assert {path.name for path in folder.iterdir()} == {name, name.replace("talk", "short")}
    assert "From 0.0." in (folder / name).read_text()


def test_a_stopped_run_goes_on_where_it_was(tmp_path, sound, model, heard, monkeypatch, capsys) -> None:
    command = (sound, "--model", model, "--output", tmp_path / "talk.txt")
    assert transcribe(*command) == 0
    whole, count = (tmp_path / "talk.txt").read_text(), len(heard)
    (tmp_path / "talk.txt").unlink()
    answers = transcriber.answers

    def stopped(*args: object) -> Iterator[Answer]:
        for number, answer in enumerate(answers(*args)):
            if number == 2:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(transcriber, "answers", stopped)
    assert transcribe(*command) == 130
    assert "goes on" in capsys.readouterr().err
    assert not (tmp_path / "talk.txt").exists()
    (state,) = tmp_path.glob(".talk.txt*")
    monkeypatch.setattr(transcriber, "answers", answers)
    heard.clear()
    assert transcribe(*command) == 0
    assert len(heard) == count - 2
    assert (tmp_path / "talk.txt").read_text() == whole
    assert not state.exists()


@pytest.mark.parametrize("change", ["the sound", "the model", "the state"])
def test_what_was_done_for_something_else_is_not_used(tmp_path, sound, model, heard, monkeypatch, change) -> None:
    from phi4_mlx.files.manifest import file_sha256
    from phi4_mlx.transcription.progress import Progress, model_identity
    from phi4_mlx.transcription.tasks import TRANSCRIBE

    output = tmp_path / "talk.txt"
    wave = np.zeros(round(LONGEST_S * RATE))
    digest = "0" * 64 if change == "the sound" else file_sha256(sound)
    identity = "other" if change == "the model" else model_identity(Path(model))
    progress = Progress(output, digest, identity, TRANSCRIBE)
    assert transcribe(sound, "--model", model, "--output", output) == 0
    count = len(heard)
    for part in heard:
        progress.add(Part(part.start, part.end, wave, RATE), "wrong")
    if change == "the state":
        progress.file.write_text(progress.file.read_text()[:-9])
    heard.clear()
    assert transcribe(sound, "--model", model, "--output", output) == 0
    assert len(heard) == count and "wrong" not in output.read_text()


def test_a_model_with_another_adapter_is_another_model(tmp_path) -> None:
    from phi4_mlx.transcription.progress import model_identity

    weights = tmp_path / "speech-lora" / "adapters.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    before = model_identity(tmp_path)
    assert model_identity(tmp_path) == before
    weights.write_bytes(b"another")
    assert model_identity(tmp_path) != before


def test_silence_has_no_text_and_asks_no_model(tmp_path, model, heard, capsys) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(RATE * 60), RATE)
    assert transcribe(tmp_path / "silence.wav", "--model", model, "--format", "json") == 0
    assert json.loads(capsys.readouterr().out) == {"text": ""} and heard == []


def test_a_real_model_answers_each_part(tmp_path, model, capsys) -> None:
    soundfile.write(tmp_path / "a.wav", speech(1.5), RATE)
    assert transcribe(tmp_path / "a.wav", "--model", model) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{sound}"], "--model"),
        (["{sound}", "--model", "demo"], "demo reads only text"),
        (["{sound}", "--model", "{model}", "--word-timestamps"], "no times of words"),
        (["{sound}", "--model", "{model}", "--language", "Klingon"], "German (de)"),
        (["{sound}", "--model", "{model}", "--format", "docx"], "srt"),
        (["{here}/missing.wav", "--model", "{model}"], "No such file"),
        (["{sound}", "{here}/notes.txt", "--model", "{model}"], "notes.txt is not sound"),
        (["{sound}", "--model", "{model}", "--output", "{here}/none/talk.txt"], "folder that exists"),
        (["{sound}", "{sound}", "--model", "{model}", "--output", "{here}/new"], "would both be"),
        (["{sound}", "{sound}", "--model", "{model}", "--output", "{here}/notes.txt"], "not a folder"),
        (["{sound}", "--model", "{model}", "--output", "{sound}"], "would overwrite"),
        (["--model", "{model}"], "FILE"),
    ],
)
def test_mistakes_are_one_line(tmp_path, sound, model, heard, words, line, capsys) -> None:
    (tmp_path / "notes.txt").write_text("no sound")
    given = [word.format(sound=sound, model=model, here=tmp_path) for word in words]
    assert transcribe(*given) == 2
    out, err = capsys.readouterr()
    assert out == "" and line in err and err.count("\n") == 1
    assert heard == []


def test_a_damaged_file_among_others_is_told_and_the_others_are_written(tmp_path, sound, model, heard, capsys) -> None:
    data = (tmp_path / "talk.wav").read_bytes()
    soundfile.write(tmp_path / "bad.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (tmp_path / "good.wav").write_bytes(data)
    folder = tmp_path / "new"
    assert transcribe(tmp_path / "bad.wav", tmp_path / "good.wav", "--model", model, "--output", folder) == 2
    assert [path.name for path in folder.glob("[!.]*")] == ["good.txt"]
    err = capsys.readouterr().err
    assert "NaN" in err and "1 of 2 files" in err


def test_progress_is_shown_in_minutes_on_a_terminal(sound, model, heard, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert transcribe(sound, "--model", model) == 0
    assert "of 2:10" in capsys.readouterr().err

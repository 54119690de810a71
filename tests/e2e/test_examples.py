"""The examples with a folder of pictures or recordings, on a tiny multimodal model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.conftest import ROOT
from tests.tiny_multimodal import write_tiny_multimodal


def run(example: str, folder: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example), "given", "--model", "model", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_multimodal(tmp_path / "model")
    (tmp_path / "given").mkdir()
    return tmp_path


def test_pictures_are_described_once_each(folder: Path) -> None:
    for name, colour in (("a.png", (255, 0, 0)), ("b.png", (0, 0, 255))):
        PIL.Image.new("RGB", (60, 40), colour).save(folder / "given" / name)
    (folder / "given" / "notes.txt").write_text("no picture")
    options = ("--output", "lines.jsonl", "--max-tokens", "4")
    assert len(run("describe_pictures.py", folder, *options).splitlines()) >= 3
    written = (folder / "lines.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    assert [each["picture"] for each in lines] == ["a.png", "b.png", "notes.txt"]
    assert "text" in lines[0] and "it is not a picture" in lines[2]["error"]
    cut = written[: written.index("\n") + 12]  # stopped in the middle of a line
    (folder / "lines.jsonl").write_text(cut)
    assert run("describe_pictures.py", folder, *options).startswith("b.png: ")
    assert (folder / "lines.jsonl").read_text() == written


def test_recordings_are_transcribed_once_each(folder: Path) -> None:
    for name in ("a.wav", "b.wav"):
        with wave.open(str(folder / "given" / name), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes((9000 * np.sin(np.arange(16_000) / 20)).astype("<i2").tobytes())
    (folder / "given" / "c.wav").write_bytes(b"RIFF")
    (folder / "given" / "b.srt").write_text("mine")
    printed = run("transcribe_folder.py", folder).splitlines()
    assert printed[0] == "a.wav: written to a.srt" and printed[1].startswith("c.wav: ") and len(printed) == 2
    assert "00:00:00,000 --> 00:00:01,000" in (folder / "given" / "a.srt").read_text()
    assert (folder / "given" / "b.srt").read_text() == "mine"

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

from phi4_mlx.checkpoint import load
from phi4_mlx.convert.package import convert
from phi4_mlx.evaluation.compare import compare
from tests.conftest import ROOT, write_tiny_checkpoint
from tests.tiny_multimodal import write_tiny_multimodal


def run(example: str, folder: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example), *options, "--model", "model"],
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
    options = ("given", "--output", "lines.jsonl", "--max-tokens", "4")
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
    printed = run("transcribe_folder.py", folder, "given").splitlines()
    assert printed[0] == "a.wav: written to a.srt" and printed[1].startswith("c.wav: ") and len(printed) == 2
    assert "00:00:00,000 --> 00:00:01,000" in (folder / "given" / "a.srt").read_text()
    assert (folder / "given" / "b.srt").read_text() == "mine"


def test_a_package_is_distilled_from_its_original(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "package", quantize=True, q_group_size=32)
    draw = np.random.default_rng(0)
    texts = [" ".join(map(str, draw.integers(0, 10, 12))) for _ in range(40)]
    (tmp_path / "given").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--package", "package", "--save-path", "distilled", "--epochs", "3", "--learning-rate", "1e-3"]
    run("distil_package.py", tmp_path, "--data", "given", *options)
    before, after = (
        compare(tmp_path / "model", tmp_path / name, tmp_path / "given").a.kl.value for name in ("package", "distilled")
    )
    assert after < 0.9 * before
    load(tmp_path / "distilled", verify=True)  # the manifest is that of the new files

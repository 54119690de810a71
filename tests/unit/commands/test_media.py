"""Pictures and sounds on the command line: the answer of the Python API, and refusals of one line."""

from __future__ import annotations

import io
import json
import shutil
import wave
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from phi4_mlx.checkpoint import load
from phi4_mlx.commands import cache_prompt, context, generate, models
from phi4_mlx.generation.stream import generate as answer
from tests.adapters import adapted, save_adapter
from tests.conftest import write_tiny_checkpoint
from tests.tiny_multimodal import write_tiny_multimodal

MAX = ["--max-tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media beside a model."""
    folder = tmp_path_factory.mktemp("media")
    write_tiny_multimodal(folder / "model", layout="native")
    PIL.Image.new("RGB", (60, 40), (255, 0, 0)).save(folder / "red.png")
    PIL.Image.new("RGB", (60, 40), (0, 0, 255)).save(folder / "blue.png")
    with wave.open(str(folder / "tone.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((9000 * np.sin(np.arange(16_000) / 20)).astype("<i2").tobytes())
    return folder


Output = pytest.CaptureFixture[str]


@pytest.fixture
def out(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> Output:
    """The output of commands that run in the folder, with an empty standard input."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    return capsys


def expected(*parts: dict[str, str], text: str = "") -> str:
    model, tokenizer = load("model")
    content = [*parts, {"type": "text", "text": text}]
    return answer(model, tokenizer, tokenizer.apply_chat_template([{"role": "user", "content": content}]), max_tokens=6)


@pytest.mark.parametrize(
    ("options", "parts", "text"),
    [
        (["--image", "red.png", "--prompt", "what?"], [("image", "red.png")], "what?"),
        (["--audio", "tone.wav"], [("audio", "tone.wav")], ""),
        (
            ["--audio", "tone.wav", "--image", "blue.png", "--image", "red.png", "--prompt", "x"],
            [("image", "blue.png"), ("image", "red.png"), ("audio", "tone.wav")],
            "x",
        ),
    ],
)
def test_an_answer_is_that_of_python(options: list[str], parts: list[tuple[str, str]], text: str, out: Output) -> None:
    assert generate.main(["--model", "model", *options, *MAX]) == 0
    assert out.readouterr().out == expected(*({"type": kind, "path": path} for kind, path in parts), text=text) + "\n"


def test_a_picture_that_is_cached_need_not_be_there_again(out: Output, tmp_path: Path) -> None:
    file = str(tmp_path / "red.cache")
    cached = ["--model", "model", "--prompt-cache-file", file]
    assert cache_prompt.main([*cached, "--image", "red.png", "--prompt", "one"]) == 0
    out.readouterr()
    assert generate.main([*cached, "--prompt", "two", "--verbose", *MAX]) == 0
    text, counts = out.readouterr()
    assert text == expected({"type": "image", "path": "red.png"}, text="one\n\ntwo") + "\n"
    assert "cached tokens" in counts
    assert generate.main([*cached, "--prompt", "two", "--image", "red.png"]) == 2
    assert "--image is fixed by the file of --prompt-cache-file" in out.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "none.png", "--prompt", "x"], "none.png cannot be read: No such file or directory"),
        (["--image", "tone.wav", "--prompt", "x"], "tone.wav is a sound, not a picture"),
        (["--image", "model/config.json", "--prompt", "x"], "config.json cannot be read"),
        (["--audio", "red.png"], "red.png is a picture, not a sound"),
        (["--prompt", ""], "the prompt is empty"),
    ],
)
def test_what_is_wrong_costs_a_line(options: list[str], message: str, out: Output) -> None:
    assert generate.main(["--model", "model", *options]) == 2
    text, error = out.readouterr()
    assert message in error and error.count("\n") == 1 and not text


def test_a_text_model_names_those_that_read_media(out: Output, tmp_path: Path) -> None:
    text_model = str(write_tiny_checkpoint(tmp_path / "text"))
    assert generate.main(["--model", text_model, "--image", "red.png", "--prompt", "x"]) == 2
    error = out.readouterr().err
    assert "reads only text; Phi-4-multimodal-instruct and the embedded demo-multimodal" in error
    assert error.count("\n") == 1


def test_an_adapter_of_the_user_is_for_text(out: Output, tmp_path: Path) -> None:
    model, _ = load("model")
    save_adapter(adapted(model), tmp_path / "mine", {})
    options = ["--model", "model", "--adapter-path", str(tmp_path / "mine"), *MAX]
    assert generate.main([*options, "--prompt", "x"]) == 0
    out.readouterr()
    assert generate.main([*options, "--prompt", "x", "--image", "red.png"]) == 2
    error = out.readouterr().err
    assert "cannot be used together with" in error and error.count("\n") == 1


def test_the_memory_plan_names_towers_and_adapters(out: Output) -> None:
    assert context.main(["--model", "model", "--json"]) == 0
    plan = json.loads(out.readouterr().out)
    parts = plan["parts_bytes"]
    assert [*parts] == ["decoder", "towers for media", "vision adapter", "speech adapter"]
    assert sum(parts.values()) == plan["weights_bytes"]
    for name in ("vision", "speech"):
        (weights,) = Path(f"model/{name}-lora").glob("*.safetensors")
        assert 0 < weights.stat().st_size - parts[f"{name} adapter"] < 4096
    assert context.main(["--model", "model"]) == 0
    assert "towers for media, " in out.readouterr().out


def test_the_list_says_what_a_model_reads(out: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.EMBEDDED, "media", tmp_path / "media")
    shutil.copytree("model", tmp_path / "media")
    assert models.main(["--json"]) == 0
    found = {each["id"]: each for each in json.loads(out.readouterr().out)["models"]}
    assert (found["media"]["loads"], found["media"]["reads_media"]) == (True, True)
    assert not found["demo"]["reads_media"]
    sizes = [path.stat().st_size for path in (tmp_path / "media").rglob("*") if path.is_file()]
    assert found["media"]["bytes"] == sum(sizes)
    assert models.main([]) == 0
    assert "yes; reads pictures and sound" in out.readouterr().out

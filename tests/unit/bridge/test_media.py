"""Pictures and sounds through the bridge: by path, in base64 and in JSON; what they cost; what is wrong is an event."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest

from phi4_mlx import bridge
from phi4_mlx.checkpoint import load
from phi4_mlx.generation.stream import generate
from phi4_mlx.tokens.media.image import image_tokens
from tests.tiny_multimodal import write_tiny_multimodal

TEXT = {"type": "text", "text": "what?"}


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (60, 40), colour).save(file, "PNG")
    return file.getvalue()


RED = png((255, 0, 0))
IN_BASE64 = {"type": "image", "base64": base64.b64encode(RED).decode()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_multimodal(tmp_path_factory.mktemp("bridge") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[int]:
    number = bridge.load(str(folder))["model"]
    yield number
    bridge.unload(number)


def test_an_answer_is_that_of_python(model: int, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "red").write_bytes(RED)
    loaded, tokenizer = load(folder)
    messages = [{"role": "user", "content": [{"type": "image", "path": str(tmp_path / "red")}, TEXT]}]
    prompt = tokenizer.apply_chat_template(messages)
    expected = generate(loaded, tokenizer, prompt, max_tokens=6)
    assert bridge.chat(model, messages, max_tokens=6)["text"] == expected
    given = json.dumps({"model": model, "messages": [{"role": "user", "content": [IN_BASE64, TEXT]}], "max_tokens": 6})
    answer = json.loads(bridge.chat_json(given))
    assert answer["text"] == expected
    assert answer["prompt_tokens"] == len(prompt) == answer["cached_tokens"] + 1  # the same bytes, another source


def test_another_picture_is_another_prompt(model: int) -> None:
    counts = []
    for colour in ((0, 255, 0), (0, 0, 255)):
        part = {"type": "image", "base64": base64.b64encode(png(colour)).decode()}
        answer = bridge.chat(model, [{"role": "user", "content": [part, TEXT]}], max_tokens=2)
        counts.append(answer["cached_tokens"])
    assert counts[1] < 5  # only what stands before the picture


def test_the_price_of_a_picture_is_told(model: int) -> None:
    with_picture, without = (
        bridge.count_tokens(model, messages=[{"role": "user", "content": content}])["tokens"]
        for content in ([IN_BASE64, TEXT], "what?")
    )
    settings = bridge.WORKER.model(model).tokenizer.media
    assert settings is not None
    assert with_picture - without == image_tokens(60, 40, crop_size=settings.crop_size, max_crops=settings.max_crops)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image", "path": "/none.png"}, "/none.png cannot be read: there is no such file"),
        ({"type": "image", "base64": "%%"}, "is not base64"),
        ({"type": "image", "base64": "aGVsbG8="}, "it is not a picture"),
        ({"type": "image", "url": "https://example.com/a.png"}, "is not fetched: https: URLs are never opened"),
        ({"type": "image"}, "it has none"),
        ({"type": "video", "path": "/a"}, "neither text, image nor audio"),
        ({"type": "audio", "base64": base64.b64encode(RED).decode()}, "PNG picture"),
        (3, "neither text, image nor audio"),
    ],
)
def test_a_wrong_part_is_an_event(model: int, part: object, message: str) -> None:
    messages = [{"role": "user", "content": [part, TEXT]}]
    for event in (bridge.chat(model, messages), bridge.count_tokens(model, messages=messages)):  # type: ignore[list-item]
        assert (event["event"], event["code"]) == ("error", "request")
        assert message in event["message"] and "\n" not in event["message"]
    assert bridge.chat(model, [{"role": "user", "content": "hi"}], max_tokens=1)["event"] == "finish"


def test_a_text_model_refuses_them() -> None:
    number = bridge.load("demo")["model"]
    event = bridge.chat(number, [{"role": "user", "content": [IN_BASE64, TEXT]}])
    assert "reads only text; Phi-4-multimodal-instruct" in event["message"]
    bridge.unload(number)

"""Pictures and sounds from a request to the engine's job: order, prices, refusals, and the room that they take."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from phi4_mlx.checkpoint import load_config, load_tokenizer_and_format
from phi4_mlx.server import bodies as bodies_module
from phi4_mlx.server import media_reader
from phi4_mlx.server.apis.media_part import Attachment
from phi4_mlx.tokens.media.image import image_tokens
from tests.conftest import write_tiny_checkpoint
from tests.e2e.test_server_bodies import check_answer, spoiled
from tests.unit.server.in_process import events_of
from tests.unit.server.media_server import SETTINGS, MediaServer, b64, clip, image_url, input_audio, picture

TEXT = {"type": "text", "text": "What is it?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("media") / "tiny")


@pytest.fixture
def server(folder: Path) -> MediaServer:
    return MediaServer(load_tokenizer_and_format(folder, None, load_config(folder).model_type))


def test_media_reach_the_engine_in_the_order_given(server: MediaServer) -> None:
    response = server.ask(image_url(picture(shade=1)), TEXT, input_audio(), image_url(picture(shade=2)))
    assert response.status_code == 200, response.text
    (job,) = server.engine.given
    assert [medium.kind for medium in job.prompt.media] == ["image", "audio", "image"]
    assert job.prompt.mode == "vision_speech"
    first, _, last = job.prompt.media
    assert first.padded[0, 0, 0] == 1 and last.padded[0, 0, 0] == 2  # type: ignore[union-attr]
    again = pickle.loads(pickle.dumps(job))  # as it crosses to the engine
    assert again.prompt.keys == job.prompt.keys


def test_usage_counts_the_tokens_of_media(server: MediaServer) -> None:
    price = image_tokens(40, 30, crop_size=SETTINGS.crop_size, max_crops=SETTINGS.max_crops)
    with_one, without = server.ask(TEXT, image_url()).json(), server.ask(TEXT).json()
    assert with_one["usage"]["prompt_tokens"] - without["usage"]["prompt_tokens"] == price
    source = {"type": "base64", "media_type": "image/png", "data": b64(picture())}
    content = [{"type": "image", "source": source}, TEXT]
    body = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": content}]}
    counted = server.post("/v1/messages/count_tokens", body).json()["input_tokens"]
    assert counted == with_one["usage"]["prompt_tokens"]
    assert server.post("/v1/messages", body).json()["usage"]["input_tokens"] == counted
    sound = server.ask(TEXT, input_audio(clip(1.0))).json()["usage"]["prompt_tokens"]
    assert sound - without["usage"]["prompt_tokens"] == 13  # 98 frames


@pytest.mark.parametrize(
    ("detail", "crops"), [("low", 1), ("high", 4), ("auto", 4), ("original", 4), (None, 4), (5, 4)]
)
def test_detail_limits_the_crops(server: MediaServer, detail: Any, crops: int) -> None:
    assert server.ask(image_url(picture(200, 200), detail=detail)).status_code == 200
    (medium,) = server.engine.given[0].prompt.media
    assert medium.tokens == image_tokens(200, 200, crop_size=SETTINGS.crop_size, max_crops=crops)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_each_api_answers_about_a_picture(server: MediaServer, path: str, stream: bool) -> None:
    url = f"data:image/png;base64,{b64(picture())}"
    part: Any = {"type": "image_url", "image_url": {"url": url}}
    if path == "/v1/responses":
        part = {"type": "input_image", "image_url": url}
    elif path == "/v1/messages":
        part = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": b64(picture())}}
    messages = [{"role": "user", "content": [part]}]
    response = server.post(path, {"max_tokens": 9, "stream": stream, "messages": messages, "input": messages})
    assert response.status_code == 200 and len(server.engine.given[0].prompt.media) == 1
    if stream:
        assert len(events_of(response)) > 3
    assert "square" in response.text


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the media that are decoded."""
    paths: list[str] = []
    real = Attachment.decoded
    monkeypatch.setattr(Attachment, "decoded", lambda it: (paths.append(it.path), real(it))[1])
    return paths


def test_older_turns_keep_their_pictures_and_are_decoded_once(server: MediaServer, decoded: list[str]) -> None:
    question = {"role": "user", "content": [image_url(), TEXT]}
    assert server.post("/v1/chat/completions", {"messages": [question]}).status_code == 200
    more = [question, {"role": "assistant", "content": "A square."}, {"role": "user", "content": "Its colour?"}]
    assert server.post("/v1/chat/completions", {"messages": more}).status_code == 200
    first, second = (job.prompt for job in server.engine.given)
    assert second.keys[: len(first) - 1] == first.keys[:-1] and len(second.media) == 1
    assert len(decoded) == 1


def test_the_latest_media_are_kept_within_a_limit(
    server: MediaServer, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 56 * 56 * 3
    monkeypatch.setattr(media_reader, "KEPT_MEDIA_BYTES", 2 * size)
    for shade, so_far in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):  # the third replaces the second
        assert server.ask(image_url(picture(shade=shade))).status_code == 200
        assert len(decoded) == so_far


def refusal(response: Any, word: str, param: str | None = None) -> None:
    error = response.json()["error"]
    assert response.status_code == 400 and word in error["message"], response.text
    assert "\n" not in error["message"] and len(error["message"]) < 400 and "Traceback" not in response.text
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    "data",
    [
        b"not a picture", b"\x89PNG\r\n\x1a\n", picture()[:60], b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<html></html>", b"%!PS-Adobe-3.0 EPSF-3.0\n", clip(), b"\0" * 100_000,
    ],
)  # fmt: skip
def test_a_picture_that_is_none_is_refused_by_its_path(server: MediaServer, data: bytes) -> None:
    refusal(server.ask(TEXT, image_url(data)), "content[1].image_url.url", "messages[0].content[1].image_url.url")
    assert server.engine.given == []


@pytest.mark.parametrize("data", [b"not a sound", picture(), clip()[:30], clip(0.01), b"RIFF\0\0\0\0WAVE"])
def test_a_sound_that_is_none_is_refused_by_its_path(server: MediaServer, data: bytes) -> None:
    path = "messages[0].content[1].input_audio.data"
    refusal(server.ask(TEXT, input_audio(data)), path, path)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/v1/chat/completions", lambda data: {"type": "file", "file": {"filename": "a.pdf", "file_data": data}}),
        ("/v1/responses", lambda data: {"type": "input_file", "filename": "a.pdf", "file_data": data}),
        (
            "/v1/messages",
            lambda data: {"type": "document", "source": {"type": "base64", "data": data.partition(",")[2]}},
        ),
    ],
)
def test_the_pages_of_a_pdf_are_pictures(server: MediaServer, path: str, part: Any) -> None:
    pytest.importorskip("pypdfium2")
    file, pages = io.BytesIO(), [PIL.Image.new("RGB", (60, 40), colour) for colour in ("red", "green")]
    pages[0].save(file, "PDF", save_all=True, append_images=pages[1:])
    messages = [{"role": "user", "content": [part(f"data:application/pdf;base64,{b64(file.getvalue())}")]}]
    response = server.post(path, {"max_tokens": 5, "messages": messages, "input": messages})
    assert response.status_code == 200, response.text
    first, second = server.engine.given[0].prompt.media
    assert first.kind == second.kind == "image" and first.digest != second.digest
    broken = [{"role": "user", "content": [part(f"data:application/pdf;base64,{b64(picture())}")]}]
    refused = server.post(path, {"max_tokens": 5, "messages": broken, "input": broken})
    assert refused.status_code == 400 and "/tmp" not in refused.text and "content[0]" in refused.text


def test_a_declared_type_does_not_matter(server: MediaServer) -> None:
    """The content decides: clients name PNG what is JPEG."""
    assert server.ask(image_url(picture(kind="JPEG"))).status_code == 200


def test_too_many_pictures_are_refused_before_any_is_decoded(
    server: MediaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attachment, "decoded", lambda it: pytest.fail("decoded"))
    small = image_url()
    refusal(server.ask(*[small] * 65), "65 pictures; the limit is 64", "messages[0].content[64].image_url.url")


def test_64_pictures_are_answered(server: MediaServer) -> None:
    assert server.ask(*[image_url()] * 64).status_code == 200
    assert len(server.engine.given[0].prompt.media) == 64


def test_media_that_do_not_fit_are_refused_before_the_rest_is_decoded(server: MediaServer) -> None:
    server.engine.longest = 60
    refusal(server.ask(*[image_url()] * 20), "prompt is too long", "messages[0].content[4].image_url.url")


def test_an_adapter_of_the_user_takes_no_media(server: MediaServer) -> None:
    refusal(server.ask(TEXT, image_url(), model="mine"), "'mine' is an adapter", "model")
    assert server.ask(TEXT, model="mine").status_code == 200 and server.engine.given[0].adapter == "mine"


def test_a_text_only_model_answers_as_ever(folder: Path) -> None:
    server = MediaServer(load_tokenizer_and_format(folder, None, load_config(folder).model_type), media=False)
    refusal(server.ask(TEXT, image_url()), "is 'image_url'; this model reads only text", "messages[0].content[1].type")
    (model, _) = server.request("GET", "/v1/models").json()["data"]
    assert model["architecture"]["input_modalities"] == ["text"] and "media" not in model


def test_the_listing_says_what_a_model_takes(server: MediaServer) -> None:
    own, mine = server.request("GET", "/v1/models").json()["data"]
    assert own["architecture"] == {"input_modalities": ["text", "image", "audio"], "output_modalities": ["text"]}
    assert own["media"] == {"crop_size": 56, "max_crops": 4}
    assert mine["architecture"]["input_modalities"] == ["text"] and "media" not in mine
    listed = server.request("GET", "/v1/models", headers={"anthropic-version": "2023-06-01"}).json()["data"]
    assert [each["capabilities"]["image_input"]["supported"] for each in listed] == [True, False]


def test_the_bytes_of_decoded_media_are_free_after_the_request(
    server: MediaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.ask(TEXT, image_url()).status_code == 200
    assert server.bodies.held == server.bodies.used == 0
    monkeypatch.setattr(bodies_module, "MEDIA_BYTES", 56 * 56 * 3)
    response = server.ask(image_url(picture(shade=1)), image_url(picture(shade=2)))
    assert response.status_code == 503 and "send fewer" in response.json()["error"]["message"]
    assert server.bodies.held == 0 and server.ask(image_url()).status_code == 200


@pytest.mark.slow
def test_a_photo_of_12_megabytes_has_room_and_49_have_not(server: MediaServer) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (1000, 4100, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(noise).save(file, "PNG", compress_level=0)
    assert len(file.getvalue()) > 12_000_000
    assert server.ask(image_url(file.getvalue())).status_code == 200
    huge = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (49 * 2**20)}}
    response = server.ask(huge)
    assert response.status_code == 413 and "limit" in response.json()["error"]["message"]
    assert server.bodies.used == 0


SPOILT = int(os.environ.get("BODIES", "120"))


@pytest.mark.slow
def test_any_body_with_media_is_answered_or_refused(server: MediaServer) -> None:
    draw, source = random.Random(5), {"type": "base64", "media_type": "image/png", "data": b64(picture())}
    pdf = {"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{b64(clip())}"}}
    url = image_url()["image_url"]["url"]
    parts = [image_url(detail="low"), input_audio(), pdf, {"type": "input_image", "image_url": url, "detail": "auto"},
             {"type": "image", "source": source}, {"type": "image", "data": b64(picture()), "mimeType": "image/png"},
             {"type": "document", "title": "A", "source": {"type": "text", "data": "B"}}, TEXT]  # fmt: skip
    statuses = Counter[int]()
    for _ in range(SPOILT):
        path = draw.choice(["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"])
        result = {"type": "tool_result", "tool_use_id": "1", "content": draw.sample(parts, 2)}
        output = {"type": "function_call_output", "call_id": "1", "output": draw.sample(parts, 2)}
        turns = [{"role": "user", "content": draw.sample(parts, 2)}, {"role": "assistant", "content": "ok"},
                 {"role": "user", "content": [*draw.sample(parts[:5], 1), TEXT]}]  # fmt: skip
        turns.insert(2, {"role": "user", "content": [result]} if "messages" in path else output)
        body: Any = {"messages": turns, "input": turns, "max_tokens": 4, "stream": draw.random() < 0.3}
        for _ in range(draw.choice([0, 1, 1, 2])):
            body["messages" if "messages" in path else "input"] = body["messages"] = spoiled(draw, turns)
        data = json.dumps(body).encode("utf-8", "surrogatepass")
        answer = server.request("POST", path, content=data, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400), (path, body, answer.text)
        check_answer(answer)
        statuses[answer.status_code] += 1
    assert min(statuses[200], statuses[400]) > SPOILT / 20, statuses
    assert server.bodies.held == server.engine.jobs == 0

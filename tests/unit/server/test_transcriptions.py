"""Transcripts: forms in, text of parts in their order out, and forms that are refused, with their files deleted."""

from __future__ import annotations

import asyncio
import io
import itertools
import tempfile
import wave
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from phi4_mlx.checkpoint import load_config, load_tokenizer_and_format
from phi4_mlx.server import bodies as bodies_module
from phi4_mlx.server import speech as speech_module
from phi4_mlx.server.engine.protocol import Job
from phi4_mlx.server.upload import Upload
from tests.conftest import write_tiny_checkpoint
from tests.unit.server.in_process import events_of
from tests.unit.server.media_server import MediaServer, clip, picture

PATH = "/v1/audio/transcriptions"


def speech(*seconds: float, pause: float = 0.6, rate: int = 8_000) -> bytes:
    """A WAV file with tones of these lengths and pauses between them."""
    random = np.random.default_rng(3)
    tones = [np.sin(np.arange(int(each * rate)) * 0.3) * 0.3 for each in seconds]
    gap = random.normal(size=int(pause * rate)) * 1e-5
    samples = np.concatenate([part for tone in tones for part in (tone, gap)])
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("speech") / "tiny")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def server(folder: Path, files: Path) -> MediaServer:
    return MediaServer(load_tokenizer_and_format(folder, None, load_config(folder).model_type))


def post(server: MediaServer, data: bytes, path: str = PATH, **fields: Any) -> httpx.Response:
    form = {"model": "tiny", **fields}
    return server.request("POST", path, files={"file": ("a clip.wav", data, "audio/wav")}, data=form)


def numbered(job: Job) -> str:
    """A text that tells parts apart by their length."""
    (medium,) = job.prompt.media
    return f" It takes {medium.tokens} tokens. "


def refusal(response: httpx.Response, status: int, word: str, param: str | None = None) -> None:
    error = response.json()["error"]
    assert response.status_code == status and word in error["message"], response.text
    assert "\n" not in error["message"] and len(error["message"]) < 400
    assert param is None or error["param"] == param


def test_a_clip_is_one_job_in_the_words_of_the_card(server: MediaServer, files: Path) -> None:
    body = post(server, clip(1.0)).json()
    (job,) = server.engine.given
    assert body["text"] == "A red square." and job.sampling.temp == 0
    prompt = server.service.tokenizer.decode([token for token in job.prompt if token != 2])
    assert prompt.endswith("Transcribe the audio clip into text.<|end|><|assistant|>")
    usage = body["usage"]
    assert usage["type"] == "tokens" and usage["input_token_details"]["audio_tokens"] == 13
    assert usage["input_tokens"] == len(job.prompt) and usage["output_tokens"] == 3
    assert list(files.iterdir()) == [] and server.bodies.uploads == 0
    post(server, clip(1.0), "/v1/audio/translations")
    prompt = server.service.tokenizer.decode([token for token in server.engine.given[1].prompt if token != 2])
    assert "Translate the audio to English." in prompt


def test_parts_run_side_by_side_and_their_text_is_in_order(
    server: MediaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech_module, "PARTS_AT_ONCE", 2)
    server.engine.reply, server.engine.together = numbered, 2
    response = post(server, speech(25.0, 26.0, 27.0), response_format="verbose_json", language="en")
    body = response.json()
    assert len(server.engine.given) == 3 and server.engine.most == 2
    segments = body["segments"]
    assert [each["text"] for each in segments] == [
        f"It takes {medium.tokens} tokens." for (medium,) in (job.prompt.media for job in server.engine.given)
    ]
    assert body["text"] == " ".join(each["text"] for each in segments)
    assert all(before["end"] <= after["start"] for before, after in itertools.pairwise(segments))
    assert body["language"] == "english" and body["task"] == "transcribe" and "x-phi4-ignored" not in response.headers
    assert body["duration"] == pytest.approx(25 + 26 + 27 + 3 * 0.6)
    assert body["usage"] == {"type": "duration", "seconds": body["duration"]}


@pytest.mark.parametrize(
    ("form", "start"),
    [
        ("text", "A red square.\n"),
        ("srt", "1\n00:00:00,000 --> 00:00:01,000\nA red square.\n"),
        ("vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nA red square.\n"),
    ],
)
def test_formats_of_text(server: MediaServer, form: str, start: str) -> None:
    response = post(server, clip(1.0), response_format=form)
    assert response.text.startswith(start) and response.headers["content-type"] == "text/plain; charset=utf-8"


def test_a_stream_has_the_text_as_it_grows(server: MediaServer, files: Path) -> None:
    server.engine.reply = numbered
    response = post(server, speech(25.0, 30.0), stream="true")
    assert response.headers["content-type"].startswith("text/event-stream")
    *deltas, done = events_of(response)
    assert {event["type"] for event in deltas} == {"transcript.text.delta"} and len(deltas) > 4
    assert done["type"] == "transcript.text.done" and done["text"] == "".join(event["delta"] for event in deltas)
    assert done["text"].count("It takes") == 2 and done["usage"]["output_tokens"] > 0
    assert list(files.iterdir()) == []


def test_silence_has_no_text(server: MediaServer) -> None:
    silence = io.BytesIO()
    with wave.open(silence, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(bytes(64_000))
    assert post(server, silence.getvalue()).json()["text"] == "" and server.engine.given == []
    (done,) = events_of(post(server, silence.getvalue(), stream="true"))
    assert done["text"] == "" and done["type"] == "transcript.text.done"


@pytest.mark.parametrize(
    ("fields", "word", "param"),
    [
        ({"timestamp_granularities[]": "word"}, "segment", "timestamp_granularities"),
        ({"timestamp_granularities[]": ["segment", "syllable"]}, "segment", "timestamp_granularities"),
        ({"response_format": "diarized_json"}, "one of", "response_format"),
        ({"temperature": "hot"}, "0 to 1", "temperature"),
        ({"temperature": "1.5"}, "0 to 1", "temperature"),
        ({"temperature": "nan"}, "0 to 1", "temperature"),
        ({"stream": "maybe"}, "true or false", "stream"),
        ({"model": ["tiny", "tiny"]}, "twice", "model"),
        ({"model": "nothing"}, "there is no model", "model"),
        ({"model": "mine"}, "adapter", "model"),
        ({"prompt": "x" * 70_000}, "more than", "prompt"),
        ({f"f{n}": "x" for n in range(70)}, "more than 64 fields", None),
        ({"n" * 300: "x"}, "too long", None),
    ],
)  # fmt: skip
def test_fields_that_are_wrong_are_refused(
    server: MediaServer, files: Path, fields: dict[str, Any], word: str, param: str | None
) -> None:
    refusal(post(server, clip(0.5), **fields), 404 if fields.get("model") == "nothing" else 400, word, param)
    assert list(files.iterdir()) == [] and server.engine.given == []


def test_fields_without_effect_are_named(server: MediaServer) -> None:
    fields = {"prompt": "Names: Ada.", "language": "sw", "include[]": "logprobs", "speed": "2", "stream": "false"}
    response = post(server, clip(0.5), chunking_strategy="auto", temperature="0.2", **fields)
    assert response.status_code == 200 and server.engine.given[0].sampling.temp == 0.2
    named = response.headers["x-phi4-ignored"].split(", ")
    assert sorted(named) == ["include", "language", "prompt", "speed"]
    granular = {"timestamp_granularities[]": "segment", "language": "de-AT"}
    assert "x-phi4-ignored" not in post(server, clip(0.5), **granular).headers


@pytest.mark.parametrize("data", [b"", b"not a sound", picture(), clip()[:30], clip(0.01)[:60]])
def test_a_file_that_is_no_sound_is_refused_without_its_place(server: MediaServer, files: Path, data: bytes) -> None:
    response = post(server, data)
    refusal(response, 400, "the file", "file")
    assert str(files) not in response.text and list(files.iterdir()) == []
    stream = post(server, data, stream="true")
    refusal(stream, 400, "the file", "file")


def raw(server: MediaServer, body: bytes, kind: str = "multipart/form-data; boundary=b", **more: Any) -> httpx.Response:
    return server.request("POST", PATH, content=body, headers={"content-type": kind, **more})


def part(name: str, text: bytes, more: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + text + b"\r\n"


@pytest.mark.parametrize(
    ("body", "kind", "status", "word"),
    [
        (b"", "multipart/form-data; boundary=b", 400, "ends before"),
        (b"x", "multipart/form-data", 400, "no boundary"),
        (b"x", "multipart/form-data; boundary=" + "b" * 300, 400, "no boundary"),
        (b"nonsense", "multipart/form-data; boundary=b", 400, "not a form"),
        (part("model", b"tiny"), "multipart/form-data; boundary=b", 400, "ends before"),
        (part("model", b"tiny") + b"--b--\r\n", "multipart/form-data; boundary=b", 400, "no file"),
        (part("model", b"\xff") + b"--b--\r\n", "multipart/form-data; boundary=b", 400, "UTF-8"),
        (part("file", b"x", '; filename="a"') * 2 + b"--b--\r\n", "multipart/form-data; boundary=b", 400, "second"),
        (part("model", b"x", '; filename="a"') + b"--b--\r\n", "multipart/form-data; boundary=b", 400, "must be text"),
        (b"--b\r\nX: y\r\n\r\nz\r\n--b--\r\n", "multipart/form-data; boundary=b", 400, "without a name"),
        (b"--b\r\nX: " + b"y" * 70_000 + b"\r\n\r\nz\r\n--b--\r\n", "multipart/form-data; boundary=b", 400, "header"),
        (b"{}", "application/json", 415, "multipart/form-data"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "application/json"),
    ],
)
def test_bodies_that_are_no_form_are_refused(
    server: MediaServer, files: Path, body: bytes, kind: str, status: int, word: str
) -> None:
    refusal(raw(server, body, kind), status, word)
    assert list(files.iterdir()) == [] and server.bodies.uploads == 0


def test_the_sender_is_checked_before_the_body_is_read(folder: Path) -> None:
    tokenizer = load_tokenizer_and_format(folder, None, load_config(folder).model_type)
    server = MediaServer(tokenizer, key="secret")

    async def body() -> AsyncIterator[bytes]:
        pytest.fail("read")
        yield b""

    def send(**headers: str) -> httpx.Response:
        more = {"content-type": "multipart/form-data; boundary=b", "content-length": "500000", **headers}
        return server.request("POST", PATH, content=body(), headers=more)

    assert send().status_code == 401
    refused = send(origin="https://evil.example", authorization="Bearer secret")
    assert refused.status_code == 403 and refused.headers["connection"] == "close"
    assert send(host="evil.example", authorization="Bearer secret").status_code == 403
    text_only = MediaServer(tokenizer, media=False)
    more = {"content-type": "multipart/form-data; boundary=b", "content-length": "500000"}
    response = text_only.request("POST", PATH, content=body(), headers=more)
    refusal(response, 400, "this model reads only text")
    assert response.headers["connection"] == "close"
    assert text_only.request("POST", PATH + "/../v1/models", content=body(), headers=more).status_code != 200


def test_a_form_that_is_too_large_is_refused(server: MediaServer, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies_module, "UPLOAD_BYTES", 100_000)

    async def body() -> AsyncIterator[bytes]:
        yield part("file", b"", '; filename="a"')[:-2]
        for _ in range(20):
            yield b"x" * 10_000

    response = server.request("POST", PATH, content=body(), headers={"content-type": "multipart/form-data; boundary=b"})
    refusal(response, 413, "over the limit of 100000 bytes")
    assert response.headers["connection"] == "close" and list(files.iterdir()) == []
    refusal(post(server, b"x" * 200_000), 413, "the limit is 100000")


def test_a_form_that_does_not_arrive_is_refused(server: MediaServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies_module, "UPLOAD_S", 0.05)

    async def body() -> AsyncIterator[bytes]:
        yield part("model", b"tiny")
        await asyncio.sleep(60)

    response = server.request("POST", PATH, content=body(), headers={"content-type": "multipart/form-data; boundary=b"})
    refusal(response, 408, "did not arrive")


def test_uploads_at_a_time_are_limited(server: MediaServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies_module, "UPLOADS_LIMIT", 0)
    assert post(server, clip()).status_code == 503


def test_a_failure_of_a_part_is_the_request_s(server: MediaServer, files: Path) -> None:
    def fail(job: Job) -> str:
        raise RuntimeError("bug")

    server.engine.reply = fail
    assert post(server, clip()).status_code == 500 and list(files.iterdir()) == []
    assert post(server, clip(), stream="true").status_code == 500 and server.engine.jobs == 0


def test_a_form_arrives_in_any_pieces(files: Path) -> None:
    data = bytes(range(256)) + b"\r\n--a\r\n-" * 3
    whole = part("model", "tïny".encode()) + part("file", data, '; filename="a b.wav"') + b"--b--\r\n"
    for size in (1, 2, 7, len(whole)):
        upload = Upload('multipart/form-data; boundary="b"')

        async def pieces(size: int = size) -> AsyncIterator[bytes]:
            for start in range(0, len(whole), size):
                yield whole[start : start + size]

        asyncio.run(upload.read(pieces()))
        assert upload.fields == [("model", "tïny")]
        assert upload.path is not None and Path(upload.path).read_bytes() == data
        upload.close()
    assert list(files.iterdir()) == []

"""A multimodal model behind a real server: official clients ask about pictures and sound, and transcribe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.server_process import Server, serving
from tests.tiny_multimodal import write_tiny_multimodal
from tests.unit.server.media_server import b64, clip, image_url, input_audio, picture

pytestmark = pytest.mark.slow
TEXT = {"type": "text", "text": "What is it?"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_tiny_multimodal(tmp_path_factory.mktemp("model") / "tiny")
    with serving("--model", str(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def openai(server: Server) -> Any:
    library = pytest.importorskip("openai")
    return library.OpenAI(api_key="k", base_url=f"{server.url}/v1", max_retries=0)


def ask(openai: Any, *parts: Any, **more: Any) -> Any:
    messages = [{"role": "user", "content": [*parts]}]
    return openai.chat.completions.create(model="tiny", max_tokens=6, temperature=0, messages=messages, **more)


def test_the_same_picture_is_read_once_and_another_is_not_taken_for_it(openai: Any) -> None:
    dark, light = picture(200, 120, 1), picture(200, 120, 250)
    first, again, other = (ask(openai, image_url(data), TEXT) for data in (dark, dark, light))
    assert first.choices[0].message.content == again.choices[0].message.content
    assert first.usage.prompt_tokens == again.usage.prompt_tokens == other.usage.prompt_tokens
    assert again.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1
    assert other.usage.prompt_tokens_details.cached_tokens < 3  # none of the picture
    assert ask(openai, image_url(light), TEXT).choices[0].message.content == other.choices[0].message.content


def test_a_stream_says_what_the_whole_answer_says(openai: Any) -> None:
    for parts in ([image_url(), TEXT], [TEXT, input_audio()], [image_url(), input_audio(), TEXT], [TEXT]):
        whole = ask(openai, *parts)
        chunks = [*ask(openai, *parts, stream=True, stream_options={"include_usage": True})]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content and chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_responses_and_messages_see_the_same_picture(openai: Any, server: Server) -> None:
    anthropic = pytest.importorskip("anthropic").Anthropic(api_key="k", base_url=server.url, max_retries=0)
    expected = ask(openai, image_url(), TEXT).usage.prompt_tokens
    content = [{"type": "input_image", "image_url": f"data:image/png;base64,{b64(picture())}"},
               {"type": "input_text", "text": TEXT["text"]}]  # fmt: skip
    given = [{"role": "user", "content": content}]
    assert openai.responses.create(model="tiny", max_output_tokens=4, input=given).usage.input_tokens == expected
    source = {"type": "base64", "media_type": "image/png", "data": b64(picture())}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}, TEXT]}]
    assert anthropic.messages.count_tokens(model="tiny", messages=messages).input_tokens == expected
    usage = anthropic.messages.create(model="tiny", max_tokens=4, messages=messages).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == expected
    with anthropic.messages.stream(model="tiny", max_tokens=4, messages=messages) as stream:
        assert stream.get_final_message().usage.output_tokens > 0


def test_transcripts_for_the_official_client(openai: Any) -> None:
    file = ("clip.wav", clip(1.0))
    whole = openai.audio.transcriptions.create(model="tiny", file=file)
    *deltas, done = openai.audio.transcriptions.create(model="tiny", file=file, stream=True)
    assert done.text == whole.text == "".join(event.delta for event in deltas)
    assert done.usage.input_token_details.audio_tokens == 13
    verbose = openai.audio.transcriptions.create(
        model="tiny", file=file, response_format="verbose_json", timestamp_granularities=["segment"], language="en"
    )
    assert [each.text for each in verbose.segments] == [whole.text] and verbose.duration == pytest.approx(1.0)
    subtitles = openai.audio.transcriptions.create(model="tiny", file=file, response_format="srt")
    assert subtitles.startswith("1\n00:00:00,000 --> 00:00:01,000\n")
    with pytest.raises(pytest.importorskip("openai").BadRequestError, match="the file is a PNG picture"):
        openai.audio.transcriptions.create(model="tiny", file=("clip.wav", picture()))


def test_the_server_goes_on_after_hostile_media(openai: Any, server: Server) -> None:
    for data in (b"\x89PNG\r\n\x1a\n" + b"\0" * 1000, b"GIF89a", clip(), b"%PDF-1.7"):
        response = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [image_url(data)]}]})
        assert response.status_code == 400 and "messages[0].content[0]" in response.json()["error"]["message"]
    assert ask(openai, image_url()).usage.completion_tokens > 0 and server.idle()

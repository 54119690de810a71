"""Pictures and sounds in the bodies of the three APIs: read, refused by their path, or replaced by a placeholder."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest

from phi4_mlx.server.apis import chat, messages, responses
from phi4_mlx.server.apis.media_part import Attachment
from phi4_mlx.server.apis.wire import WireError
from tests.unit.server.apis.harness import V

DATA = base64.b64encode(b"a picture").decode()
URL = f"data:image/png;base64,{DATA}"
TEXT = {"type": "text", "text": "What is it?"}
WEB = "https://example.com/cat.png"


def chat_message(*parts: Any, media: bool = True, **more: Any) -> Any:
    return chat.parse({"messages": [{"role": "user", "content": [*parts]}], **more}, V, media=media)


def response(*parts: Any, media: bool = True) -> Any:
    return responses.parse({"input": [{"role": "user", "content": [*parts]}]}, V, media=media)


def anthropic(*parts: Any, media: bool = True) -> Any:
    return messages.parse({"messages": [{"role": "user", "content": [*parts]}]}, V, media=media)


def image_url(url: Any = URL, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def sound(data: Any = DATA, **more: Any) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav", **more}}


def input_image(url: Any = URL, **more: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": url, **more}


def source(data: Any = DATA, kind: str = "base64", **more: Any) -> dict[str, Any]:
    return {"type": "image", "source": {"type": kind, "media_type": "image/png", "data": data, **more}}


def mcp(kind: str = "image", data: Any = DATA) -> dict[str, Any]:
    return {"type": kind, "data": data, "mimeType": "image/png"}


READ: list[tuple[Callable[..., Any], Any, Attachment]] = [
    (chat_message, image_url(), Attachment("image", DATA, "messages[0].content[1].image_url.url")),
    (chat_message, image_url(detail="low"), Attachment("image", DATA, "messages[0].content[1].image_url.url", 1)),
    (chat_message, image_url(detail="high"), Attachment("image", DATA, "messages[0].content[1].image_url.url")),
    (chat_message, image_url(detail="auto"), Attachment("image", DATA, "messages[0].content[1].image_url.url")),
    (chat_message, input_image(), Attachment("image", DATA, "messages[0].content[1].image_url")),
    (chat_message, sound(), Attachment("audio", DATA, "messages[0].content[1].input_audio.data")),
    (chat_message, sound(f"data:audio/wav;base64,{DATA}"),
     Attachment("audio", DATA, "messages[0].content[1].input_audio.data")),
    (response, input_image(detail="low"), Attachment("image", DATA, "input[0].content[1].image_url", 1)),
    (response, image_url(), Attachment("image", DATA, "input[0].content[1].image_url.url")),
    (response, sound(), Attachment("audio", DATA, "input[0].content[1].input_audio.data")),
    (anthropic, source(), Attachment("image", DATA, "messages[0].content[1].source.data")),
    (anthropic, mcp(), Attachment("image", DATA, "messages[0].content[1].data")),
    (chat_message, mcp("audio"), Attachment("audio", DATA, "messages[0].content[1].data")),
    (chat_message, {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;codecs=1;BASE64,{DATA}"}},
     Attachment("audio", DATA, "messages[0].content[1].audio_url.url")),
]  # fmt: skip


@pytest.mark.parametrize(("parse", "part", "found"), READ)
def test_a_medium_is_read_in_its_place(parse: Callable[..., Any], part: Any, found: Attachment) -> None:
    ask = parse(TEXT, part, TEXT, TEXT)
    twice = {"type": "text", "text": TEXT["text"] * 2}
    assert ask.messages == [{"role": "user", "content": [TEXT, {"type": found.kind, found.kind: found}, twice]}]
    assert ask.ignored == ()


@pytest.mark.parametrize("parse", [chat_message, response, anthropic])
def test_a_medium_needs_no_text(parse: Callable[..., Any]) -> None:
    (message,) = parse(source(), {"type": "text", "text": ""}).messages
    assert [part["type"] for part in message["content"]] == ["image"]
    assert parse(TEXT).messages == [{"role": "user", "content": "What is it?"}]


@pytest.mark.parametrize(
    ("parse", "part", "param", "word"),
    [
        *((chat_message, image_url(url), "image_url.url", "data: URL") for url in (
            WEB, "file:///etc/passwd", "http://169.254.169.254/", "data:image/png,%89PNG", "data:image/png;base64",
            "", "cat.png", "//example.com/cat.png", "ftp://a", 5, ["x"], {"url": URL}, True,
        )),
        (chat_message, {"type": "image_url"}, "image_url", "is missing"),
        (chat_message, {"type": "image_url", "image_url": 7}, "image_url", "must be a JSON object"),
        (chat_message, {"type": "image_url", "image_url": {}}, "image_url.url", "is missing"),
        (chat_message, {"type": "image_url", "image_url": WEB}, "image_url", "data: URL"),
        (chat_message, sound(None), "input_audio.data", "is missing"),
        (chat_message, sound(5), "input_audio.data", "base64"),
        (chat_message, {"type": "input_audio", "input_audio": DATA}, "input_audio", "must be a JSON object"),
        (chat_message, {"type": "input_audio"}, "input_audio", "is missing"),
        (response, input_image(WEB), "image_url", "data: URL"),
        (response, {"type": "input_image", "file_id": "file-1"}, "file_id", "stored"),
        (response, {"type": "input_image"}, "image_url", "is missing"),
        (chat_message, {"type": "file", "file": {"file_id": "f"}}, "file.file_id", "not in the request"),
        (chat_message, {"type": "file", "file": {"filename": "a.pdf"}}, "file.file_data", "is missing"),
        (response, {"type": "input_file", "file_url": WEB}, "file_url", "not in the request"),
        (response, {"type": "input_file"}, "file_data", "is missing"),
        (anthropic, {"type": "document", "source": {"type": "url", "url": WEB}}, "source.type", "fetches nothing"),
        (anthropic, source(kind="url", url=WEB), "source.type", "fetches nothing"),
        (anthropic, source(kind="file", file_id="f"), "source.type", "stores none"),
        (anthropic, source(kind="magic"), "source.type", "must be one of"),
        (anthropic, source(None), "source.data", "is missing"),
        (anthropic, source([DATA]), "source.data", "base64"),
        (anthropic, {"type": "image"}, "data", "is missing"),
        (anthropic, {"type": "image", "source": DATA}, "source", "must be a JSON object"),
    ],
)  # fmt: skip
def test_a_medium_whose_bytes_are_not_in_the_body_is_refused(
    parse: Callable[..., Any], part: Any, param: str, word: str
) -> None:
    with pytest.raises(WireError) as caught:
        parse(TEXT, part)
    error = caught.value
    assert error.status == 400 and word in error.message and "\n" not in error.message and len(error.message) < 300
    where = "input[0].content[1]" if parse is response else "messages[0].content[1]"
    assert error.param == f"{where}.{param}"


@pytest.mark.parametrize("kind", ["video_url", "container_upload", "hologram", ""])
def test_a_part_of_another_type_is_refused(kind: str) -> None:
    with pytest.raises(WireError, match="this model reads only text, images and audio") as caught:
        chat_message(TEXT, {"type": kind})
    assert caught.value.param == "messages[0].content[1].type"


@pytest.mark.parametrize("part", [image_url(), input_image(), source(), sound(), mcp()])
@pytest.mark.parametrize("parse", [chat_message, response, anthropic])
def test_a_text_only_model_refuses_media(parse: Callable[..., Any], part: Any) -> None:
    with pytest.raises(WireError, match=r"this model reads only text$"):
        parse(TEXT, part, media=False)


def test_a_document_of_text_is_text() -> None:
    document = {"type": "document", "title": "A", "source": {"type": "text", "data": "B"}}
    assert anthropic(document).messages == [{"role": "user", "content": "A\nB"}]


def test_older_turns_keep_their_media_and_have_a_placeholder_for_what_cannot_be_read() -> None:
    older = {"role": "user", "content": [TEXT, image_url(), image_url(WEB)]}
    body = {
        "messages": [older, {"role": "assistant", "content": [TEXT, image_url()]}, {"role": "user", "content": "?"}]
    }
    ask = chat.parse(body, V, media=True)
    kept, placeholder = ask.messages[0]["content"][1:]
    assert kept["image"].data == DATA
    assert placeholder == {"type": "text", "text": "[image_url left out: it cannot be read here]"}
    assert ask.messages[1]["content"].startswith("What is it?[image_url left out")
    assert ask.ignored == ("messages[0].content[2]", "messages[1].content[1]")


def test_results_of_tools_have_media() -> None:
    found = {"type": "text", "text": "found"}
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "see", "input": {}}]}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [found, source()], "is_error": True}
    body = {"messages": [{"role": "user", "content": "?"}, use, {"role": "user", "content": [result, TEXT]}]}
    *_, tool, user = messages.parse(body, V, media=True).messages
    assert tool["role"] == "tool" and tool["content"][0] == {"type": "text", "text": "Error: found"}
    assert tool["content"][1]["image"].path == "messages[2].content[0].content[1].source.data"
    assert user == {"role": "user", "content": "What is it?"}
    call = {"type": "function_call", "call_id": "c", "name": "see", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "found"}]}
    output["output"].append(input_image())  # type: ignore[attr-defined]
    *_, tool = responses.parse({"input": [TEXT | {"type": "message", "role": "user", "content": "?"}, call, output]}, V,
                               media=True).messages  # fmt: skip
    assert [part["type"] for part in tool["content"]] == ["text", "image"]
    told = chat.parse(
        {"messages": [{"role": "user", "content": "?"}, {"role": "tool", "content": [image_url(), image_url(WEB)]}]},
        V, media=True,
    )  # fmt: skip
    assert [part["type"] for part in told.messages[1]["content"]] == ["image", "text"]


@pytest.mark.parametrize(
    ("data", "word"),
    [("@@@@", "not base64"), ("AAA", "not base64"), ("é" * 4, "not base64"), ("", "empty"), ("-_-_", "not base64")],
)
def test_base64_that_is_not_one_is_refused(data: str, word: str) -> None:
    with pytest.raises(WireError, match=word) as caught:
        Attachment("image", data, "a.b").decoded()
    assert caught.value.param == "a.b" and len(caught.value.message) < 200


def test_base64_may_have_line_breaks() -> None:
    assert Attachment("image", "YSBw\r\naWN0 dXJl\n", "a.b").decoded() == b"a picture"

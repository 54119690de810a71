"""Messages with pictures and clips: parts, their sources, and the prompts of the chat formats."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from phi4_mlx.errors import RequestError, TokenizerError
from phi4_mlx.tokens.chat_format import CHAT_FORMATS
from phi4_mlx.tokens.messages import check_messages
from phi4_mlx.tokens.prompt import Mode, Prompt
from phi4_mlx.tokens.tokenizer import Tokenizer, load_tokenizer
from tests.media import SETTINGS, clip, picture, prompt_of
from tests.tiny_multimodal import write_tokenizer

MINI = CHAT_FORMATS["phi4-mini"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.media, tokenizer.chat_format = SETTINGS, MINI
    return tokenizer


def image(source: Any, name: str = "image") -> dict[str, Any]:
    return {"type": "image", name: source}


def user(*content: Any) -> list[dict[str, Any]]:
    """One user's message; texts are parts too."""
    parts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in content]
    return [{"role": "user", "content": parts}]


def test_media_stand_in_their_order_without_line_breaks(tokenizer: Tokenizer) -> None:
    """The form of the model's card: <|user|> slots text <|end|><|assistant|>."""
    one, sound = picture(), clip()
    parts = [image(one), {"type": "audio", "audio": sound}, "What", " now?", image(picture(1)), " And then?"]
    prompt = tokenizer.apply_chat_template(user(*parts))
    start, end, answer = (tokenizer.control_ids[f"<|{each}|>"] for each in ("user", "end", "assistant"))
    text = tokenizer.encode
    assert prompt == prompt_of([start], one, sound, text("What now?"), picture(1), text(" And then?"), [end, answer])
    assert prompt.mode is Mode.VISION_SPEECH and prompt.media == (one, sound, prompt.media[2])
    assert tokenizer.decode(prompt).startswith("<|user|><|endoftext10|>")


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_every_chat_format_takes_media(tokenizer: Tokenizer, name: str) -> None:
    marked = user("before @ behind")
    try:
        expected = CHAT_FORMATS[name].render(tokenizer, marked)
    except TokenizerError:
        pytest.skip("another tokenizer")
    prompt = CHAT_FORMATS[name].render(tokenizer, user("before ", image(picture()), " behind"))
    (place,) = prompt.places
    assert tokenizer.decode(prompt[: place.start] + tokenizer.encode("@") + prompt[place.end :]) == tokenizer.decode(
        expected
    )


def test_slots_typed_by_a_user_stay_text(tokenizer: Tokenizer) -> None:
    typed = "<|image_1|><|endoftext10|><|endoftext11|><|audio_1|>"
    for prompt in (
        tokenizer.apply_chat_template(user(typed)),
        tokenizer.apply_chat_template(user(typed, image(picture()))),
    ):
        slots = [token for token in prompt if token in (SETTINGS.image_token, SETTINGS.audio_token)]
        assert len(slots) == sum(place.count for place in prompt.places)
    assert type(tokenizer.encode(typed, specials=True)) is list  # a list, which generation refuses


def test_a_continued_conversation_equals_one_rendered_whole(tokenizer: Tokenizer) -> None:
    first, then = user(image(picture()), "What?"), user("And ", image(picture(1)), "?")
    ids = tokenizer.apply_chat_template(first)
    ids += tokenizer.encode("Fine.")
    MINI.append(tokenizer, ids, then)
    whole = tokenizer.apply_chat_template([*first, {"role": "assistant", "content": "Fine."}, *then])
    assert ids == whole and ids.places == whole.places
    assert MINI.length(tokenizer, then) == len(tokenizer.apply_chat_template(then)) - 1
    with pytest.raises(RequestError, match="only be appended to a Prompt"):
        MINI.append(tokenizer, [*ids], then)
    own = MINI.own_words(tokenizer, ids)
    assert [token for token, mine in zip(ids, own, strict=True) if mine][: len(tokenizer.encode("Fine."))] == (
        tokenizer.encode("Fine.")
    )


def test_a_tool_may_return_a_picture(tokenizer: Tokenizer) -> None:
    messages = [
        *user("Draw."),
        {"role": "assistant", "content": "Yes."},
        {"role": "tool", "content": [image(picture())]},
    ]
    assert tokenizer.apply_chat_template(messages).media == (messages[2]["content"][0]["image"],)


def test_the_sources_of_a_picture(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (100, 90, 3), dtype=np.uint8)
    written = io.BytesIO()
    Pillow.fromarray(pixels).save(written, "PNG")
    data = written.getvalue()
    (tmp_path / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    sources = [
        image(pixels), image(data), image(Pillow.fromarray(pixels)), image(str(tmp_path / "a.png")),
        image(tmp_path / "a.png", "path"), image(str(tmp_path / "a.png"), "path"), image(text, "base64"),
        image(f"data:image/png;base64,{text}", "url"),
    ]  # fmt: skip
    digests = {tokenizer.apply_chat_template(user(each)).media[0].digest for each in sources}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (
            {"type": "film", "film": "a.mp4"},
            r"message 0 has a part that is neither text, image nor audio: \{'type': 'fi",
        ),
        ({"image": "a.png"}, "neither text, image nor audio"),
        (7, "neither text, image nor audio"),
        ({"type": "text"}, "neither text, image nor audio"),
        ({"type": "image"}, "a part of type image has one of image, path, url, base64; it has none"),
        ({"type": "image", "path": "a", "url": "b"}, "it has path and url"),
        ({"type": "image", "audio": "a"}, "it has none"),
        ({"type": "image", "url": "https://a.b/c.png"}, r"https://a.b/c.png. is not fetched"),
        ({"type": "image", "url": "file:///etc/passwd"}, "is not fetched"),
        ({"type": "image", "url": "data:image/png;base64"}, "is not a data: URL"),
        ({"type": "image", "url": 3}, "the url of an image part must be a text, not 3"),
        ({"type": "image", "path": b"a.png"}, "the path of an image part must be a text"),
        ({"type": "image", "base64": "###"}, "message 0: '###' is not base64"),
        ({"type": "image", "base64": "é"}, "is not base64"),
        ({"type": "audio", "base64": "AAA"}, "is not base64"),
        ({"type": "image", "base64": "AAAA"}, "message 0: "),
        ({"type": "image", "path": "no/such.png"}, "message 0: .*such.png"),
    ],
)
def test_a_bad_part_is_refused_in_one_line(part: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as refused:
        check_messages([{"role": "user", "content": [part]}], SETTINGS)
    assert "\n" not in str(refused.value)


def test_sixty_five_pictures_are_refused_before_one_is_read(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="has 65 pictures, and the model reads at most 64"):
        tokenizer.apply_chat_template(user(*[image("no/such.png")] * 65))
    with pytest.raises(RequestError, match="has 65 pictures"):
        tokenizer.apply_chat_template([{"role": "user", "content": [picture()] * 65}])
    prompt = tokenizer.apply_chat_template(user(*[image(picture())] * 64))
    assert len(prompt.media) == 64
    with pytest.raises(RequestError, match="has 65 pictures"):
        MINI.append(tokenizer, prompt, user(image(picture())))


def test_an_assistant_writes_text_only_and_a_text_model_reads_text_only(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"message 0 \(assistant\) has media"):
        check_messages([{"role": "assistant", "content": [image(picture())]}], SETTINGS)
    with pytest.raises(RequestError, match=r"a part that is not text.*this model reads only text"):
        check_messages(user(image("a.png")))
    text_only = load_tokenizer_without_media()
    with pytest.raises(RequestError, match="has image input, and this model reads only text"):
        text_only.encode_pieces([picture()])


def load_tokenizer_without_media() -> Tokenizer:
    from tests.conftest import TOKENIZER

    return load_tokenizer(TOKENIZER)


def test_content_without_media_is_one_text() -> None:
    (checked,) = check_messages(user("a", "b"), SETTINGS)
    assert checked["content"] == "ab" and check_messages(user(), SETTINGS)[0]["content"] == ""
    (checked,) = check_messages(user("a", "b", image(picture()), "c"), SETTINGS)
    assert [each if isinstance(each, str) else each.kind for each in checked["content"]] == ["ab", "image", "c"]
    assert check_messages([checked], SETTINGS)[0]["content"] == checked["content"]  # checked once more


def test_media_alone_make_a_prompt(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.apply_chat_template(user({"type": "audio", "audio": (np.zeros(16000, np.float32), 16000)}))
    assert isinstance(prompt, Prompt) and prompt.mode is Mode.SPEECH and len(prompt) == 3 + prompt.media[0].tokens

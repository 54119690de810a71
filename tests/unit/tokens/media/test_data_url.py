"""base64 and data: URLs: strict, and never a fetch."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media.audio import read_audio
from phi4_mlx.tokens.media.data_url import url_bytes
from phi4_mlx.tokens.media.image import read_image

TEXT = base64.b64encode(bytes(range(256))).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/png;BASE64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:image/svg+xml;charset=utf-8;base64,{TEXT}",
        f" data:audio/wav;base64,{TEXT[:76]}\r\n{TEXT[76:]}\n",
    ],
)
def test_a_data_url_holds_its_bytes(url: str) -> None:
    assert url_bytes(url) == bytes(range(256))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1/a.png", "never opened"),
        ("https://example.com/a.png", "never opened"),
        ("file:///etc/passwd", "never opened"),
        ("/etc/passwd", "never opened"),
        ("", "never opened"),
        ("data:image/png,abc", "not a data: URL with base64"),
        ("data:image/png;base64", "not a data: URL with base64"),
        ("data:" + "a" * 5000 + ";base64,AAAA", "not a data: URL with base64"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,AAA", "not base64"),
        ("data:image/png;base64,AA-_", "not base64"),
        ("data:image/png;base64,not base64 at all!", "not base64"),
        ("data:image/png;base64,AAAA=AAAA", "not base64"),
        ("data:image/png;base64,ÄÖÜ=", "not base64"),
    ],
)
def test_any_other_url_is_refused_in_one_line(url: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refusal:
        url_bytes(url)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("read", [read_image, read_audio])
def test_a_url_in_place_of_a_path_is_read_if_it_holds_its_data_and_never_fetched(read: Callable[[str], object]) -> None:
    with pytest.raises(RequestError, match=r"'https://example.com/a.png' is not fetched: https: URLs are never opened"):
        read("https://example.com/a.png")
    with pytest.raises(RequestError, match="is not base64"):
        read("data:image/png;base64,!")

"""Media that stand in a request as text: base64, and data: URLs that hold it."""

from __future__ import annotations

import base64
import binascii
import re

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media.picture_header import MOST_BYTES

_DATA_URL = re.compile(r"data:[^,]{0,1000}?(;base64)?,", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_URL = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def base64_bytes(text: str) -> bytes:
    """Decodes base64; line breaks and spaces in it are skipped.

    Args:
        text: standard base64 with its padding.

    Returns:
        The bytes; at least one.

    Raises:
        RequestError: the text is not base64, is empty, or holds more than a file may have.
    """
    if len(text) > MOST_BYTES // 3 * 4 + 4:
        raise RequestError(f"base64 of {len(text):,} characters is too long; the limit is {MOST_BYTES:,} bytes in it")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{text!r:.60} is not base64 ({error})") from None
    if not data:
        raise RequestError("the base64 text is empty")
    return data


def is_url(text: str) -> bool:
    """True for a URL rather than a path."""
    return _URL.match(text) is not None


def url_bytes(url: str) -> bytes:
    """The bytes in a data: URL. Nothing is ever fetched.

    Args:
        url: `data:image/png;base64,...`; the media type is not looked at, as content decides.

    Raises:
        RequestError: it is another URL, or its data are not base64.
    """
    url = url.strip()
    if url[:5].lower() != "data:":
        kind = _SCHEME.match(url)
        raise RequestError(
            f"{url!r:.200} is not fetched: {f'{kind[0]} URLs' if kind else 'URLs'} are never opened; "
            "send the bytes in a data: URL (data:image/png;base64,...)"
        )
    head = _DATA_URL.match(url)
    if not head or not head[1]:
        raise RequestError(f"{url!r:.60} is not a data: URL with base64: it must begin like data:image/png;base64,")
    return base64_bytes(url[head.end() :])

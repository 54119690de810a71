"""Pictures and sounds in a body, in the forms of OpenAI's and Anthropic's APIs and of MCP.

Their bytes must be in the body itself: the server fetches no URL, opens no file and stores none. A part is only taken
apart here; `MediaReader` decodes it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from phi4_mlx.server.apis.fields import Fields, shown
from phi4_mlx.server.apis.wire import WireError

LOW_DETAIL_CROPS = 1  # of a picture that a client sends with "detail": "low"
_DATA_URL = "must be a data: URL with base64 (data:image/png;base64,...); this server fetches nothing"


@dataclass(frozen=True)
class Attachment:
    """A picture or a sound of a body, not yet decoded.

    Attributes:
        kind: its kind.
        data: its bytes in base64.
        path: the place of `data` in the body.
        max_crops: most crops of a picture; None for the model's own limit.
    """

    kind: Literal["image", "audio"]
    data: str
    path: str
    max_crops: int | None = None

    def decoded(self) -> bytes:
        """The bytes.

        Raises:
            WireError: `data` is not base64, or is empty.
        """
        text = "".join(self.data.split()) if any(map(self.data.__contains__, " \r\n\t")) else self.data
        try:
            found = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise WireError(400, f"{self.path} is not base64: {error!s:.100}", self.path) from None
        if not found:
            raise WireError(400, f"{self.path} is empty", self.path)
        return found


def attachment(part: Fields, kind: str) -> Attachment:
    """The picture or sound of a part.

    Args:
        part: the part.
        kind: its type, one of `FORMS`.

    Raises:
        WireError: its bytes are not in the body, or have another form; names the field.
    """
    return FORMS[kind](part)


def _image_url(part: Fields) -> Attachment:
    """OpenAI's: a URL, or an object with it, and the detail."""
    if part.has("file_id"):
        part.refuse("file_id", "names a stored file, and this server stores none; send a data: URL")
    part.need("image_url")
    holder, name = (part, "image_url") if isinstance(part.get("image_url"), str) else (part.child("image_url"), "url")
    return _from_url("image", holder, name, _max_crops(holder))


def _audio_url(part: Fields) -> Attachment:
    """That of other servers, in the form of OpenAI's image_url."""
    part.need("audio_url")
    holder, name = (part, "audio_url") if isinstance(part.get("audio_url"), str) else (part.child("audio_url"), "url")
    return _from_url("audio", holder, name)


def _input_audio(part: Fields) -> Attachment:
    """OpenAI's: base64 and the name of its format; the sound itself says what it is."""
    part.need("input_audio")
    holder = part.child("input_audio")
    holder.get("format")
    return _from_base64("audio", holder)


def _source(kind: Literal["image", "audio"]) -> Callable[[Fields], Attachment]:
    """Anthropic's form, with a source, or MCP's, with the base64 in the part itself."""

    def read(part: Fields) -> Attachment:
        part.get("mimeType")
        if not part.has("source"):
            return _from_base64(kind, part)
        source = part.child("source")
        source.get("media_type")
        if source.one_of("type", ("base64", "url", "file")) == "base64":
            return _from_base64(kind, source)
        if source.get("type") == "file":
            source.refuse("type", "is 'file', and this server stores none; send the type base64")
        source.refuse("type", "is 'url', and this server fetches nothing; send the type base64")

    return read


FORMS: dict[str, Callable[[Fields], Attachment]] = {
    "image_url": _image_url,
    "input_image": _image_url,
    "image": _source("image"),
    "audio": _source("audio"),
    "input_audio": _input_audio,
    "audio_url": _audio_url,
}


def _max_crops(holder: Fields) -> int | None:
    """One crop for a low detail; any other detail is the model's own rule."""
    return LOW_DETAIL_CROPS if holder.get("detail") == "low" else None


def _from_url(kind: Literal["image", "audio"], holder: Fields, name: str, max_crops: int | None = None) -> Attachment:
    holder.need(name)
    url = holder.get(name)
    if not isinstance(url, str):
        holder.refuse(name, f"{_DATA_URL}, not {shown(url)}")
    head, comma, data = url.partition(",")
    scheme, _, params = head[:1_000].partition(":")
    if scheme.lower() != "data" or not comma or params.lower().rpartition(";")[2].strip() != "base64":
        holder.refuse(name, f"{_DATA_URL}, and got {shown(url)}")
    return Attachment(kind, data, holder.where(name), max_crops)


def _from_base64(kind: Literal["image", "audio"], holder: Fields) -> Attachment:
    holder.need("data")
    data: Any = holder.get("data")
    if not isinstance(data, str):
        holder.refuse("data", f"must be base64 as text, not {shown(data)}")
    if data[:5].lower() == "data:":  # some clients send a data: URL
        return _from_url(kind, holder, "data")
    return Attachment(kind, data, holder.where("data"))

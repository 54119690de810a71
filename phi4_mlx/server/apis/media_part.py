"""Pictures, sounds and PDF files in a body, in the forms of OpenAI's and Anthropic's APIs and of MCP.

Their bytes must be in the body itself: the server fetches no URL, opens no file and stores none. A part is only taken
apart here; `MediaReader` decodes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from phi4_mlx.errors import RequestError
from phi4_mlx.server.apis.fields import Fields, shown
from phi4_mlx.server.apis.wire import WireError
from phi4_mlx.tokens.media.data_url import base64_bytes

Kind = Literal["image", "audio", "pdf"]
LOW_DETAIL_CROPS = 1  # of a picture that a client sends with "detail": "low"
_DATA_URL = "must be a data: URL with base64 (data:image/png;base64,...)"


@dataclass(frozen=True)
class Attachment:
    """A picture, a sound or a PDF file of a body, not yet decoded.

    Attributes:
        kind: its kind.
        data: its bytes in base64.
        path: the place of `data` in the body.
        max_crops: most crops of a picture; None for the model's own limit.
    """

    kind: Kind
    data: str
    path: str
    max_crops: int | None = None

    def decoded(self) -> bytes:
        """The bytes.

        Raises:
            WireError: `data` is not base64, or is empty.
        """
        try:
            return base64_bytes(self.data)
        except RequestError as error:
            raise WireError(400, f"{self.path}: {error}", self.path) from None


def attachment(part: Fields, kind: str) -> Attachment:
    """The picture, sound or PDF file of a part.

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
    return _from_text("audio", holder)


def _source(kind: Kind) -> Callable[[Fields], Attachment]:
    """Anthropic's form, with a source, or MCP's, with the base64 in the part itself."""

    def read(part: Fields) -> Attachment:
        part.get("mimeType")
        if not part.has("source"):
            return _from_text(kind, part)
        source = part.child("source")
        source.get("media_type")
        if source.one_of("type", ("base64", "url", "file")) == "base64":
            return _from_text(kind, source)
        if source.get("type") == "file":
            source.refuse("type", "is 'file', and this server stores none; send the type base64")
        source.refuse("type", "is 'url', and this server fetches nothing; send the type base64")

    return read


def _file(part: Fields) -> Attachment:
    """OpenAI's, with the data in the part or in its field "file"; or a document of Anthropic's."""
    if find_spec("pypdfium2") is None:
        part.refuse("type", "is a file; this server reads PDF files with pypdfium2, which is not installed")
    if part.has("source"):
        return _source("pdf")(part)
    holder = part.child("file") if part.has("file") else part
    holder.get("filename")
    for name in ("file_id", "file_url"):
        if holder.has(name):
            holder.refuse(name, "names a file that is not in the request; send it as file_data")
    holder.need("file_data")
    return _from_text("pdf", holder, "file_data")


FORMS: dict[str, Callable[[Fields], Attachment]] = {
    "image_url": _image_url,
    "input_image": _image_url,
    "image": _source("image"),
    "audio": _source("audio"),
    "input_audio": _input_audio,
    "audio_url": _audio_url,
    "file": _file,
    "input_file": _file,
    "document": _file,
}


def _max_crops(holder: Fields) -> int | None:
    """One crop for a low detail; any other detail is the model's own rule."""
    return LOW_DETAIL_CROPS if holder.get("detail") == "low" else None


def _from_url(kind: Kind, holder: Fields, name: str, max_crops: int | None = None) -> Attachment:
    holder.need(name)
    url = holder.get(name)
    if not isinstance(url, str):
        holder.refuse(name, f"{_DATA_URL}, not {shown(url)}")
    head, comma, data = url.partition(",")
    scheme, _, params = head[:1_000].partition(":")
    if scheme.lower() != "data" or not comma or params.lower().rpartition(";")[2].strip() != "base64":
        holder.refuse(name, f"{_DATA_URL}, not {shown(url)}; this server fetches nothing")
    return Attachment(kind, data, holder.where(name), max_crops)


def _from_text(kind: Kind, holder: Fields, name: str = "data") -> Attachment:
    """Base64, or a data: URL, which some clients send in its place."""
    holder.need(name)
    data: Any = holder.get(name)
    if not isinstance(data, str):
        holder.refuse(name, f"must be base64 as text, not {shown(data)}")
    if data[:5].lower() == "data:":
        return _from_url(kind, holder, name)
    return Attachment(kind, data, holder.where(name))

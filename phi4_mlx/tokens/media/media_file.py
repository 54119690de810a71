"""Pictures, pages of PDFs and sounds from files that a person names, with what they cost in tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phi4_mlx.errors import RequestError
from phi4_mlx.files.manifest import file_sha256
from phi4_mlx.files.regular_file import open_regular
from phi4_mlx.terminal.amount import amount
from phi4_mlx.tokens.media.audio import Audio, read_audio
from phi4_mlx.tokens.media.image import Image, read_image

if TYPE_CHECKING:
    from phi4_mlx.tokens.tokenizer import Tokenizer

Kind = Literal["image", "audio"]
FileKind = Literal["image", "audio", "pdf"]

MODEL_THAT_READS_MEDIA = "Phi-4-multimodal-instruct"
SPEECH_S = 40  # seconds; the longest clips that the model was trained to transcribe or translate. Source: its card

_NOUNS = {"image": "a picture", "audio": "a sound", "pdf": "a PDF"}

# The first bytes of a file -> its kind. A name says nothing about a file's content.
_SIGNATURES: tuple[tuple[FileKind, re.Pattern[bytes]], ...] = (
    ("pdf", re.compile(rb"%PDF-")),
    ("image", re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|BM.{4}\0{4}|II\*\0|MM\0\*|RIFF.{4}WEBP", re.DOTALL)),
    ("image", re.compile(rb".{4}ftyp(?:heic|heix|heif|mif1|msf1|avif)", re.DOTALL)),
    ("audio", re.compile(rb"RIFF.{4}WAVE|RF64.{4}WAVE|fLaC|OggS|FORM.{4}AIF[FC]|caff\0|\x1aE\xdf\xa3", re.DOTALL)),
    ("audio", re.compile(rb".{4}ftyp(?:M4A|M4B|mp4|isom)|ID3[\2-\4]|\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd]", re.DOTALL)),
)


@dataclass(frozen=True)
class MediaFile:
    """A medium that goes with a question, and the file that it comes from.

    Attributes:
        path: of the file, absolute.
        sha256: of the file, in hexadecimal.
        medium: as the model reads it; None for a file that is gone, or has another content by now.
        kind: "image" or "audio".
        page: of a PDF, from 1; None for other files.
    """

    path: str
    sha256: str
    medium: Image | Audio | None
    kind: Kind
    page: int | None = None

    @property
    def name(self) -> str:
        """The file's name, with the page."""
        return os.path.basename(self.path) + (f", page {self.page}" if self.page else "")

    @property
    def tokens(self) -> int:
        """Tokens that it takes in a prompt."""
        return 0 if self.medium is None else self.medium.tokens

    @property
    def price(self) -> str:
        """A line with its name and its tokens, of a sound also the duration."""
        if self.medium is None:
            return f"{self.name} is gone or has changed since"
        length = f"{amount(self.medium.seconds, 'second')}, " if isinstance(self.medium, Audio) else ""
        return f"{self.name}: {length}{amount(self.medium.tokens, 'token')}"

    @property
    def part(self) -> dict[str, Any]:
        """The part of a message that the tokenizer reads."""
        return {"type": self.kind, self.kind: self.medium}

    @property
    def record(self) -> dict[str, Any]:
        """The part of a message that a saved conversation keeps."""
        page = {} if self.page is None else {"page": self.page}
        return {"type": self.kind, "path": self.path, **page, "sha256": self.sha256}

    def read_again(self, tokenizer: Tokenizer) -> MediaFile:
        """The same medium as another tokenizer's model reads it; its file is read, and may be gone or changed."""
        try:
            same = file_sha256(Path(self.path)) == self.sha256
        except OSError:
            same = False
        (medium,) = _read(self.path, self.kind, tokenizer, [self.page]) if same else (None,)
        return replace(self, medium=medium)


def of_record(record: object, tokenizer: Tokenizer) -> MediaFile:
    """The attachment that a part of a message stands for, as `MediaFile.record` writes it.

    Args:
        record: the part.
        tokenizer: of the model.

    Raises:
        RequestError: it is anything else, or the file cannot be read as what it is.
    """
    match record:
        case {"type": "image" | "audio" as kind, "path": str() as path, "sha256": str() as sha256, **rest}:
            page = rest.get("page")
            if os.path.isabs(path) and (page is None or (type(page) is int and page > 0)):
                return MediaFile(path, sha256, None, kind, page).read_again(tokenizer)
    raise RequestError(f"{record!r:.100} is not a picture or a sound with a path and its sha256")


def kind_of(path: str) -> FileKind | None:
    """The kind of a regular file, by its first bytes; None if it is neither a picture nor sound, or cannot be read."""
    try:
        with open_regular(Path(path)) as file:
            head = file.read(16)
    except OSError:
        return None
    return next((kind for kind, signature in _SIGNATURES if signature.match(head)), None)


def media_of_file(path: str, kind: Kind, tokenizer: Tokenizer, pages: str = "") -> list[MediaFile]:
    """Reads a file of pictures or sound; what it costs is known afterwards, before the model reads it.

    Args:
        path: the file; its content must be of the kind.
        kind: "image", also for PDFs, each page of which is a picture, or "audio".
        tokenizer: of the model.
        pages: of a PDF: numbers from 1 and ranges, as in "1, 3-5"; all of them by default.

    Returns:
        The medium, or one for each page.

    Raises:
        RequestError: the file cannot be read, or is something else.
    """
    path = os.path.abspath(path)
    found = kind_of(path)
    if found is not None and (found == "audio") != (kind == "audio"):
        raise RequestError(f"{path} is {_NOUNS[found]}, not {_NOUNS[kind]}")
    if pages and found != "pdf":
        raise RequestError(f"{path} is not a PDF, and only a PDF has pages; leave out {pages!r:.100}")
    numbers: list[int | None] = _page_numbers(path, pages) if found == "pdf" else [None]
    media = _read(path, kind, tokenizer, numbers)
    sha256 = file_sha256(Path(path))
    return [MediaFile(path, sha256, medium, kind, number) for medium, number in zip(media, numbers, strict=True)]


def check_reads_media(tokenizer: Tokenizer, model_name: str = "this model") -> None:
    """Refuses media for a model that reads only text.

    Args:
        tokenizer: of the model.
        model_name: for the message.

    Raises:
        RequestError: the model reads only text; names the model to use.
    """
    if tokenizer.media is None:
        raise RequestError(
            f"{model_name} reads only text; {MODEL_THAT_READS_MEDIA} reads pictures and sound, and so does "
            "demo-multimodal, which is a part of this package"
        )


def _read(path: str, kind: str, tokenizer: Tokenizer, pages: Sequence[int | None]) -> list[Image | Audio]:
    """The media of a file: a sound, a picture, or the pages of a PDF as pictures."""
    check_reads_media(tokenizer)
    assert tokenizer.media is not None
    if kind == "audio":
        return [read_audio(path)]
    size, most = tokenizer.media.crop_size, tokenizer.media.max_crops
    return [read_image(source, crop_size=size, max_crops=most) for source in _pictures(path, pages)]


def _page_numbers(path: str, pages: str) -> list[int | None]:
    raise RequestError(f"{path}: PDFs {pages}")


def _pictures(path: str, pages: Sequence[int | None]) -> list[str]:
    return [path]

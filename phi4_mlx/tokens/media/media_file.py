"""Pictures, pages of PDFs and sounds from files that a person names, with what they cost in tokens."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phi4_mlx.errors import RequestError
from phi4_mlx.files.manifest import file_sha256
from phi4_mlx.files.regular_file import open_regular
from phi4_mlx.terminal.amount import amount
from phi4_mlx.terminal.suggestion import path_suggestion
from phi4_mlx.tokens.media.audio import LONGEST_S, Audio, audio_tokens, heard
from phi4_mlx.tokens.media.image import Image, image_tokens, read_image
from phi4_mlx.tokens.media.picture_file import PictureSource, picture_size
from phi4_mlx.tokens.media.picture_header import MeteredFile, UnreadablePicture, picture_format
from phi4_mlx.tokens.media.sound_file import open_sound
from phi4_mlx.tokens.media.sound_header import kind_of as sound_kind
from phi4_mlx.tokens.prompt import READS_ONLY_TEXT, Kind

if TYPE_CHECKING:
    from phi4_mlx.tokens.tokenizer import Tokenizer

FileKind = Literal["image", "audio", "pdf"]

SPEECH_S = 40  # seconds; the longest clips that the model was trained to transcribe or translate. Source: its card

_WITH_PAGES = re.compile(r"(.*?\S)\s+(\d[\d,\s-]*)", re.DOTALL)
_NOUNS = {"image": "a picture", "audio": "a sound", "pdf": "a PDF"}


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
        seconds = self.medium.seconds if isinstance(self.medium, Audio) else None
        return f"{self.name}: {_cost(self.tokens, seconds)}"

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
        except (OSError, ValueError):  # ValueError: a path with a NUL in it
            same = False
        return replace(self, medium=_read(self, tokenizer) if same else None)

    def switched(self, before: Tokenizer, after: Tokenizer) -> MediaFile:
        """The same medium for another model, read again if that one reads media in another way.

        Raises:
            RequestError: that one reads only text.
        """
        if before.media == after.media:
            return self
        if self.medium is not None:
            check_reads_media(after, "that model", "; /reset drops those of this conversation")
        return self.read_again(after)


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
            if file.read(5) == b"%PDF-":
                return "pdf"
            with contextlib.suppress(UnreadablePicture):
                picture_format(MeteredFile(file))
                return "image"
            file.seek(0)
            sound_kind(file, path)
            return "audio"
    except (OSError, RequestError):
        return None


def media_of_file(named: str, kind: Kind, tokenizer: Tokenizer, tell: Callable[[str], object]) -> list[MediaFile]:
    """Reads a file of pictures or sound.

    Args:
        named: the path of the file, whose content must be of the kind. That of a PDF may be followed by its pages, as
            in "scan.pdf 1, 3-5"; all of them by default.
        kind: "image", also for PDFs, each page of which is a picture, or "audio".
        tokenizer: of the model.
        tell: called with a line for each medium, what it costs in tokens, before it is decoded.

    Returns:
        The medium, or one for each page.

    Raises:
        RequestError: the file cannot be read, or is something else.
    """
    check_reads_media(tokenizer)
    path, pages = os.path.abspath(os.path.expanduser(named)), ""
    with_pages = None if os.path.exists(path) else _WITH_PAGES.fullmatch(path)
    if with_pages is not None and os.path.exists(with_pages[1]):
        path, pages = with_pages.groups()
    found = kind_of(path)
    if found is not None and (found == "audio") != (kind == "audio"):
        raise RequestError(f"{path} is {_NOUNS[found]}, not {_NOUNS[kind]}")
    if pages and found != "pdf":
        raise RequestError(f"{path} is not a PDF, and only a PDF has pages; leave out {pages!r:.100}")
    try:
        sha256 = file_sha256(Path(path))
    except OSError as error:
        near = path_suggestion(path, os.path.isfile) if isinstance(error, FileNotFoundError) else ""
        raise RequestError(f"{path} cannot be read: {error.strerror}{near}") from None
    file = MediaFile(path, sha256, None, kind)
    files = [file]
    if found == "pdf":
        from phi4_mlx.tokens.media.pdf import pdf_pages

        files = [replace(file, page=page) for page in pdf_pages(path, pages)]
    return [replace(each, medium=_read(each, tokenizer, tell)) for each in files]


def check_reads_media(tokenizer: Tokenizer, model_name: str = "this model", way_out: str = "") -> None:
    """Refuses media for a model that reads only text.

    Args:
        tokenizer: of the model.
        model_name: for the message.
        way_out: the end of the message.

    Raises:
        RequestError: the model reads only text; names the model to use.
    """
    if tokenizer.media is None:
        raise RequestError(f"{model_name} {READS_ONLY_TEXT}{way_out}")


def _read(file: MediaFile, tokenizer: Tokenizer, tell: Callable[[str], object] = lambda line: None) -> Image | Audio:
    """The medium of a file; `tell` is called with what it costs, before it is decoded."""
    check_reads_media(tokenizer)
    assert tokenizer.media is not None
    if file.kind == "audio":
        with open_sound(file.path, LONGEST_S) as sound:
            tell(f"{file.name}: {_cost(audio_tokens(sound.seconds), sound.seconds)}")
            audio = heard(sound)
        return audio
    source: PictureSource = file.path
    if file.page is not None:
        from phi4_mlx.tokens.media.pdf import pdf_page

        source = pdf_page(file.path, file.page)
    crop, most = tokenizer.media.crop_size, tokenizer.media.max_crops
    tell(f"{file.name}: {_cost(image_tokens(*picture_size(source), crop_size=crop, max_crops=most))}")
    return read_image(source, crop_size=crop, max_crops=most)


def _cost(tokens: int, seconds: float | None = None) -> str:
    length = "" if seconds is None else f"{amount(seconds, 'second')}, "
    return f"{length}{amount(tokens, 'token')}"

"""Decodes the pictures, sounds and pages of requests in a few threads, and keeps the latest for the next turns."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tempfile
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING

from phi4_mlx.errors import Phi4Error
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.server.apis.media_part import Attachment
from phi4_mlx.server.apis.wire import WireError
from phi4_mlx.server.limits import KEPT_MEDIA_BYTES, MEDIA_THREADS
from phi4_mlx.tokens.messages import MAX_IMAGES

if TYPE_CHECKING:
    from phi4_mlx.tokens.media.audio import Audio
    from phi4_mlx.tokens.media.image import Image
    from phi4_mlx.tokens.prompt import MediaSettings

PDF = b"%PDF-"  # within the first kilobyte of such a file


class MediaReader:
    """Decodes attachments.

    Args:
        settings: of the model's pictures.
    """

    def __init__(self, settings: MediaSettings) -> None:
        self.settings = settings
        self._threads = ThreadPoolExecutor(MEDIA_THREADS, thread_name_prefix="media")
        self._kept: OrderedDict[bytes, Image | Audio] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    async def read(
        self, messages: Sequence[JsonObject], most_tokens: int | None, hold: Callable[[int], None]
    ) -> list[JsonObject]:
        """The messages with their pictures and sounds decoded.

        Args:
            messages: with `Attachment`s, as the APIs' parsers make them, or media that are decoded already.
            most_tokens: the most tokens of all media; None for no limit.
            hold: counts the bytes of a decoded medium; raises WireError if there is no room.

        Raises:
            WireError: a part cannot be read, or there are too many; names the part.
        """
        media = [part[part["type"]] for part in _parts(messages) if part["type"] != "text"]
        found = [each for each in media if isinstance(each, Attachment)]
        pictures = [each for each in found if each.kind == "image"]  # with pages, the tokenizer counts them again
        if len(pictures) > MAX_IMAGES:
            where = pictures[MAX_IMAGES].path
            raise WireError(400, f"{where}: there are {len(pictures)} pictures; the limit is {MAX_IMAGES}", where)
        read: dict[int, list[Image | Audio]] = {}  # by the attachment's id
        tokens = 0
        for each in found:
            read[id(each)] = []
            async for medium in self._media_of(each):
                tokens += medium.tokens
                if most_tokens is not None and tokens > most_tokens:
                    message = f"prompt is too long: {tokens} tokens of pictures and sounds > {most_tokens} maximum"
                    raise WireError(400, message, each.path, "context_length_exceeded")
                hold(_size(medium))
                read[id(each)].append(medium)
        return [_with_media(message, read) for message in messages]

    async def _media_of(self, given: Attachment) -> AsyncIterator[Image | Audio]:
        """The medium of an attachment, or the pages of a PDF file."""
        run = asyncio.get_running_loop().run_in_executor
        if given.kind != "pdf":
            yield await run(self._threads, self._read, given)
            return
        with tempfile.NamedTemporaryFile(prefix="phi4_mlx-", suffix=".pdf") as file:
            for page in await run(self._threads, _pages, given, file):
                yield await run(self._threads, self._read, given, file.name, page)

    def _read(self, given: Attachment, path: str = "", page: int = 0) -> Image | Audio:
        """A thread: decodes an attachment, or a page of the PDF file at a path, or finds it among the latest."""
        key = hashlib.sha256(f"{given.kind} {given.max_crops} {page} {given.data}".encode()).digest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        medium = self._decoded(given, path, page)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = medium
                self._kept_bytes += _size(medium)
            while self._kept_bytes > KEPT_MEDIA_BYTES:
                self._kept_bytes -= _size(self._kept.popitem(last=False)[1])
        return medium

    def _decoded(self, given: Attachment, path: str, page: int) -> Image | Audio:
        from phi4_mlx.tokens.media.audio import read_audio
        from phi4_mlx.tokens.media.image import read_image
        from phi4_mlx.tokens.media.pdf import pdf_page

        with _named(given, path):
            if given.kind == "audio":
                return read_audio(given.decoded())
            source = pdf_page(path, page) if path else given.decoded()
            crops = self.settings.max_crops if given.max_crops is None else given.max_crops
            return read_image(source, crop_size=self.settings.crop_size, max_crops=min(crops, self.settings.max_crops))


def _pages(given: Attachment, file: IO[bytes]) -> list[int]:
    """A thread: writes a PDF file; returns the numbers of its pages."""
    from phi4_mlx.tokens.media.pdf import pdf_pages

    data = given.decoded()
    if PDF not in data[:1024]:  # before a process is started for it
        raise WireError(400, f"{given.path} is not a PDF file", given.path)
    file.write(data)
    file.flush()
    with _named(given, file.name):
        return pdf_pages(file.name)


@contextlib.contextmanager
def _named(given: Attachment, path: str) -> Iterator[None]:
    """Names the part in errors, and not the server's own file."""
    try:
        yield
    except Phi4Error as error:
        message = str(error).replace(path, "the PDF") if path else str(error)
        raise WireError(400, f"{given.path}: {message}", given.path) from None


def _parts(messages: Sequence[JsonObject]) -> list[JsonObject]:
    return [part for message in messages if isinstance(message["content"], list) for part in message["content"]]


def has_media(messages: Sequence[JsonObject]) -> bool:
    """True if there is a picture or a sound in the messages."""
    return any(part["type"] != "text" for part in _parts(messages))


def _with_media(message: JsonObject, read: dict[int, list[Image | Audio]]) -> JsonObject:
    if not isinstance(message["content"], list):
        return message
    parts: list[JsonObject] = []
    for part in message["content"]:
        found = read.get(id(part[part["type"]]))
        parts += [part] if found is None else [{"type": medium.kind, medium.kind: medium} for medium in found]
    return {**message, "content": parts}


def _size(medium: Image | Audio) -> int:
    """Bytes of a decoded medium."""
    from phi4_mlx.tokens.media.image import Image

    return medium.padded.nbytes if isinstance(medium, Image) else medium.features.nbytes

"""The kind of a sound file by its first bytes, and whether all the sound is there that its header states."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from enum import Enum
from typing import BinaryIO, NamedTuple

from phi4_mlx.errors import RequestError


class Kind(Enum):
    """Kinds of sound files that need different care.

    Attributes:
        tolerance: samples that a whole file may lack of those its header states: MP3 counts in frames of 1,152.
    """

    CHUNKS = "WAV, AIFF or CAF"
    OGG = "Ogg"
    FLAC = "FLAC"
    MP3 = "MP3"
    MPEG4 = "MPEG-4"
    OTHER = "AU or W64"

    @property
    def tolerance(self) -> int:
        return 1152 if self is Kind.MP3 else 0


class Overlay(NamedTuple):
    """Bytes of a header that are read in place of those in the file."""

    position: int
    data: bytes


_MAGIC = {b"fLaC": Kind.FLAC, b"OggS": Kind.OGG, b"ID3": Kind.MP3, b"caff": Kind.CHUNKS, b".snd": Kind.OTHER}
_FORMS = {b"RIFFWAVE", b"RIFXWAVE", b"FORMAIFF", b"FORMAIFC"}
_UNKNOWN = 0x7FFFF000  # sizes from here on are the ones of writers that could not go back: SoX, FFmpeg and others
_MOST_CHUNKS = 1000  # walked through; the sound comes early
_PAGE = 65_307  # the most bytes of an Ogg page
_ENTIRELY_OTHER = {
    b"\x1aE\xdf\xa3": "WebM or Matroska", b"0&\xb2u": "Windows Media", b"#!AMR": "AMR", b"MThd": "MIDI",
    b"%PDF": "PDF", b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"GIF8": "a GIF picture",
    b"PK\x03\x04": "a ZIP archive",
}  # fmt: skip


def kind_of(file: BinaryIO, name: str) -> Kind:
    """The kind of a sound file; its content decides, not its name.

    Raises:
        RequestError: it is not sound, or of a kind that is not read.
    """
    head = file.read(16)
    if not head:
        raise RequestError(f"{name} is empty")
    if head[:4] + head[8:12] in _FORMS:
        return Kind.CHUNKS
    if head[:4] == b"RF64" or head[:4] == b"riff":
        return Kind.OTHER
    if head[4:8] == b"ftyp":
        return Kind.MPEG4
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[0] == 0xFF and len(head) > 2 and head[1] & 0xE0 == 0xE0 and head[2] & 0xF0 != 0xF0:
        if head[1] & 0xF6 == 0xF0:  # ADTS: no layer
            return Kind.MPEG4
        if head[1] & 0x06:
            return Kind.MP3
    found = next((what for magic, what in _ENTIRELY_OTHER.items() if head.startswith(magic)), "")
    is_found = f"is {found}, which is not read" if found else "is not sound that can be read"
    raise RequestError(f"{name} {is_found}; convert it to WAV, FLAC, MP3, Ogg, AIFF or CAF")


def check_whole_file(file: BinaryIO, kind: Kind, name: str) -> Overlay | None:
    """Checks that a file holds all the bytes of sound that its header states.

    libsndfile itself takes what is there and says nothing.

    Returns:
        The length of the sound as it is, where the header does not know it; None where the header is right.

    Raises:
        RequestError: bytes are missing.
    """
    length = file.seek(0, os.SEEK_END)
    if kind is Kind.OGG:
        _check_last_page(file, length, name)
        return None
    if kind is not Kind.CHUNKS:
        return None
    file.seek(0)
    head = file.read(12)
    for chunk in _chunks(file, head, length):
        if chunk.name == b"fmt ":
            _check_wave_format(file, head, name)
        if chunk.name not in (b"data", b"SSND"):
            continue
        there = length - chunk.start
        unknown = chunk.size >= _UNKNOWN or chunk.size < 0
        if chunk.size == 0 and head[:3] == b"RIF":  # a size of the whole that ends before the sound was never set
            unknown = struct.unpack(_order(head) + "I", head[4:8])[0] + 8 <= chunk.start
        if unknown and there != chunk.size:
            layout = ">q" if head[:4] == b"caff" else _order(head) + "I"
            return Overlay(chunk.start - struct.calcsize(layout), struct.pack(layout, min(there, 2**32 - 16)))
        if chunk.size - there > 1:  # a byte of padding is often missing
            raise RequestError(
                f"{name} is cut: its header states {chunk.size:,} bytes of sound, and {there:,} are there; copy it again"
            )
        return None
    raise RequestError(f"{name} has no samples")


class _Chunk(NamedTuple):
    name: bytes
    start: int  # of its content
    size: int


def _order(head: bytes) -> str:
    return "<" if head[:4] == b"RIFF" else ">"


def _chunks(file: BinaryIO, head: bytes, length: int) -> Iterator[_Chunk]:
    """The chunks of a WAV, AIFF or CAF file; the file stands at the content of each."""
    caf = head[:4] == b"caff"
    layout = ">4sq" if caf else _order(head) + "4sI"
    position = 8 if caf else 12
    for _ in range(_MOST_CHUNKS):
        file.seek(position)
        header = file.read(struct.calcsize(layout))
        if len(header) < struct.calcsize(layout):
            return
        chunk = _Chunk(*struct.unpack(layout, header)[:1], position + len(header), struct.unpack(layout, header)[1])
        yield chunk
        if chunk.size < 0 or chunk.size > length:
            return
        position = chunk.start + chunk.size + (0 if caf else chunk.size % 2)


def _check_wave_format(file: BinaryIO, head: bytes, name: str) -> None:
    """Refuses channels and rates that libsndfile refuses in words of its own."""
    from phi4_mlx.tokens.media.sound_file import check_sound_format

    fields = file.read(8)
    if len(fields) == 8:
        _, channels, rate = struct.unpack(_order(head) + "HHI", fields)
        check_sound_format(name, rate, channels)


def _check_last_page(file: BinaryIO, length: int, name: str) -> None:
    """Checks that the last page of an Ogg file is whole."""
    file.seek(max(length - 2 * _PAGE, 0))
    tail = file.read()
    page = tail[max(tail.rfind(b"OggS"), 0) :]
    segments = page[26] if len(page) > 26 else 0
    if len(page) < 27 or len(page) < 27 + segments + sum(page[27 : 27 + segments]):
        raise RequestError(f"{name} is cut: its last page is not whole; copy it again")

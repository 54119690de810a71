"""The kind of a sound file by its first bytes, and whether all the sound is there that its header states."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from enum import Enum
from typing import BinaryIO, NamedTuple

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media.log_mel import NARROW
from phi4_mlx.tokens.media.mp3_frames import after_tag, with_frame_count
from phi4_mlx.tokens.media.sound_reader import Splice

HIGHEST_RATE = 768_000  # Hz; the highest that recorders have
MOST_CHANNELS = 64


class Kind(Enum):
    """Kinds of sound files that need different care."""

    WAVE = "WAV"
    AIFF = "AIFF"
    CAF = "CAF"
    FLAC = "FLAC"
    OGG = "Ogg"
    MP3 = "MP3"
    MPEG4 = "MPEG-4 or AAC"


READ = "WAV, FLAC, MP3, Ogg, AIFF and CAF are read, and m4a on macOS"


_MAGIC = {
    b"RIFF": Kind.WAVE, b"RIFX": Kind.WAVE, b"RF64": Kind.WAVE, b"FORM": Kind.AIFF, b"caff": Kind.CAF,
    b"fLaC": Kind.FLAC, b"OggS": Kind.OGG, b"ID3": Kind.MP3,
}  # fmt: skip
_FORMS = {Kind.WAVE: (b"WAVE",), Kind.AIFF: (b"AIFF", b"AIFC")}
_UNKNOWN = 0x7FFFF000  # sizes from here on are the ones of writers that could not go back: SoX, FFmpeg and others
_MOST_CHUNKS = 1000  # walked through; the sound comes early
_NOT_READ = {
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
    for magic, kind in _MAGIC.items():
        if head.startswith(magic) and head[8:12] in _FORMS.get(kind, (head[8:12],)):
            file.seek(after_tag(file, 0))
            return Kind.FLAC if file.read(4) == b"fLaC" else kind
    if head[4:8] == b"ftyp":
        return Kind.MPEG4
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[2] & 0xF0 != 0xF0:
        if head[1] & 0xF6 == 0xF0:  # a frame of AAC has no layer
            return Kind.MPEG4
        if head[1] & 0x06:
            return Kind.MP3
    found = next((what for magic, what in _NOT_READ.items() if head.startswith(magic)), "")
    is_found = f"is {found}, which is not read as sound" if found else "is not sound that can be read"
    raise RequestError(f"{name} {is_found}; {READ}")


class Content(NamedTuple):
    """The sound in a file.

    Attributes:
        splice: the change by which the decoder finds all of it; None for none.
        frames: samples of each channel that the header states; None where the decoder knows better.
    """

    splice: Splice | None
    frames: int | None = None


def check_content(file: BinaryIO, kind: Kind, name: str) -> Content:
    """Checks that a file holds all the bytes of sound that its header states.

    libsndfile itself takes what is there and says nothing, and leaves out what comes after.

    Raises:
        RequestError: bytes are missing, or the header has a rate or a number of channels that is not read.
    """
    length = file.seek(0, os.SEEK_END)
    if kind is Kind.FLAC:
        return _flac_content(file)
    if kind is Kind.MP3:
        return Content(with_frame_count(file, name, READ))
    file.seek(0)
    if kind is Kind.OGG:
        _check_pages(file, name)
        return Content(None)
    return Content(_check_chunks(file, kind, length, name))


def _flac_content(file: BinaryIO) -> Content:
    """The decoder is told that the length is unknown, and goes to the end. Source: RFC 9639, section 8.2."""
    start = after_tag(file, 0)
    file.seek(start)
    head = file.read(26)
    if len(head) < 26:
        return Content(None)
    frames = int.from_bytes(head[21:], "big") & (2**36 - 1)
    return Content(Splice(0, start + 26, head[:21] + bytes([head[21] & 0xF0]) + bytes(4)), frames or None)


def _check_chunks(file: BinaryIO, kind: Kind, length: int, name: str) -> Splice | None:
    order = "<" if file.read(4) in (b"RIFF", b"RF64") else ">"
    large = 0  # the size of the sound in a file over 4 GB, which comes first
    for chunk, start, size in _chunks(file, kind, order):
        if chunk == b"ds64":
            large = struct.unpack("<Q", file.read(16)[8:].ljust(8, b"\0"))[0]
        if chunk == b"fmt " and len(fields := file.read(8)) == 8:
            channels, rate = struct.unpack(order + "2xHI", fields)
            check_sound_format(name, rate, channels)
        if chunk not in (b"data", b"SSND"):
            continue
        there = length - start
        unknown = size == -1 if kind is Kind.CAF else size >= _UNKNOWN
        if size == 0 and kind is Kind.WAVE:  # no chunk follows, so it is sound
            unknown = not (following := file.read(4)).isascii() or not following.decode().isprintable()
        if large and size == 2**32 - 1:
            size, unknown = large, False
        if unknown and there != size:
            layout = ">q" if kind is Kind.CAF else order + "I"
            width = struct.calcsize(layout)
            return Splice(start - width, width, struct.pack(layout, there if width == 8 else min(there, 2**32 - 16)))
        if size - there > 1:  # a byte of padding is often missing
            raise RequestError(
                f"{name} is cut: {size:,} bytes of sound are announced, and {there:,} follow; copy it again"
            )
        return None
    raise RequestError(f"{name} has no samples")


def _chunks(file: BinaryIO, kind: Kind, order: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, start of the content, size) of each chunk; the file stands at its content."""
    caf = kind is Kind.CAF
    layout = ">4sq" if caf else order + "4sI"
    position = 8 if caf else 12
    for _ in range(_MOST_CHUNKS):
        file.seek(position)
        header = file.read(struct.calcsize(layout))
        if len(header) < struct.calcsize(layout):
            return
        chunk, size = struct.unpack(layout, header)
        start = position + len(header)
        yield chunk, start, size
        if not 0 <= size < 2**62:
            return
        position = start + size + (0 if caf else size % 2)


def _check_pages(file: BinaryIO, name: str) -> None:
    """Checks that every page of an Ogg file is whole and matches its checksum: the decoder skips those that do not.

    Source: RFC 3533, section 6.
    """
    position, last = 0, False
    while header := file.read(27):
        if last and header.startswith(b"OggS") and header[5:6] == b"\x02":
            raise RequestError(f"{name} has several recordings one behind the other; split it, or convert it to FLAC")
        if not header.startswith(b"OggS"):
            if last:
                return  # tags of other programs
            raise RequestError(f"{name} is damaged after {position:,} bytes; copy it again")
        lengths = file.read(header[26]) if len(header) == 27 else b""
        content = file.read(sum(lengths))
        if len(header) < 27 or len(lengths) < header[26] or len(content) < sum(lengths):
            raise RequestError(f"{name} is cut: its last page, after {position:,} bytes, is not whole; copy it again")
        page = header[:22] + bytes(4) + header[26:] + lengths + content
        if _ogg_checksum(page) != struct.unpack("<I", header[22:26])[0]:
            raise RequestError(f"{name} is damaged after {position:,} bytes: a checksum is wrong; copy it again")
        last = bool(header[5] & 4)
        position += len(page)


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 with the highest bit first and no inversion, by that of zlib, which has the lowest first."""
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_MIRRORED), "big")


def check_sound_format(name: str, rate: int, channels: int) -> None:
    """Checks that a sample rate and a number of channels are those of sound that the model can read.

    Raises:
        RequestError: one is out of range.
    """
    if not NARROW <= rate <= HIGHEST_RATE:
        raise RequestError(
            f"{name} has a sample rate of {rate:,} Hz; it must be from {NARROW:,} to {HIGHEST_RATE:,} Hz; record or "
            "convert it at 16,000 Hz"
        )
    if not 1 <= channels <= MOST_CHANNELS:
        raise RequestError(f"{name} has {channels:,} channels; it must have 1 to {MOST_CHANNELS}")

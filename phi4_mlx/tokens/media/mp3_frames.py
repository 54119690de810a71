"""The frames of an MP3 file, counted: its header may not tell their number, or that of the first of several files.

Source: ISO/IEC 11172-3, section 2.4.1.3, and 13818-3; the Xing header as LAME writes it.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media.sound_reader import Splice

_KILOBITS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_LOW_KILOBITS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_SEARCHED = 8192  # bytes that may lie before the first frame, and between two


def with_frame_count(file: BinaryIO, name: str, advice: str) -> Splice:
    """Counts the frames of a file, for the decoder: it would guess their number, and stop there.

    Args:
        file: begins with a frame, or with an ID3 tag and then a frame.
        name: of the file, for messages.
        advice: the end of the message for a file that is no MP3.

    Returns:
        The change by which the file begins with a frame that states their number.

    Raises:
        RequestError: there are no frames, or fewer than the file states, or long stretches of something else.
    """
    length = file.seek(0, os.SEEK_END)
    first = _next_frame(file, after_tag(file, 0))
    if first is None:  # in anything else, the decoder would look for a frame byte by byte
        raise RequestError(f"{name} is not sound that can be read: no MP3 follows its first bytes; {advice}")
    file.seek(first)
    head = file.read(64)
    place = max(head.find(b"Xing"), head.find(b"Info"))
    states = place > 0 and len(head) >= place + 12 and head[place + 7] & 1
    stated = struct.unpack(">I", head[place + 8 : place + 12])[0] if states else 0
    count = max(_count(file, first, length, name) - (place > 0), 0)
    if count < stated - 1:  # some encoders count the header, too
        raise RequestError(
            f"{name} is cut or damaged: {stated:,} frames are announced, and {count:,} follow; copy it again, or "
            "convert it to WAV"
        )
    if states:
        return Splice(0, first + place + 12, head[: place + 8] + struct.pack(">I", count))
    return Splice(0, first, _stating(head, count))


def after_tag(file: BinaryIO, position: int) -> int:
    """The position behind an ID3 tag."""
    file.seek(position)
    tag = file.read(10)
    if len(tag) < 10 or not tag.startswith(b"ID3"):
        return position
    return position + 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))


def _count(file: BinaryIO, position: int, length: int, name: str) -> int:
    """The number of frames from a position on."""
    count = 0
    while position + 4 <= length:
        file.seek(position)
        size = _frame_length(file.read(4))
        if size:
            count += position + size <= length  # the last one may lack its end
            position += size
            continue
        tagged = after_tag(file, position)
        following = _next_frame(file, tagged)
        if following is None:
            if tagged == position and not _is_trailer(file, position, length):
                raise RequestError(f"{name} is damaged after {position:,} bytes: no MP3 follows; copy it again")
            break
        position = following
    return count


def _next_frame(file: BinaryIO, position: int) -> int | None:
    """The position of the first frame from here on that another one follows, or the end of the file."""
    file.seek(position)
    data = file.read(2 * _SEARCHED)
    for start in range(min(len(data) - 3, _SEARCHED)):
        if data[start] != 0xFF or not (size := _frame_length(data[start : start + 4])):
            continue
        following = data[start + size : start + size + 4]
        if len(following) < 4 or (_frame_length(following) and following[1] == data[start + 1]):
            return position + start
    return None


def _is_trailer(file: BinaryIO, position: int, length: int) -> bool:
    """True for tags of other kinds, for zeros, and for less than a decoder would search."""
    file.seek(position)
    rest = file.read(length - position)
    return (
        length - position <= _SEARCHED
        or rest.startswith((b"TAG", b"APETAGEX", b"LYRICSBEGIN"))
        or not rest.strip(b"\0")
    )


def _frame_length(header: bytes) -> int:
    """Bytes of an MPEG frame of layer III; 0 for bytes that do not begin one."""
    version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3
    bitrate, rate = header[2] >> 4, header[2] >> 2 & 3
    if header[0] != 0xFF or header[1] < 0xE0 or version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
        return 0
    first = version == 3  # MPEG 1; the others are MPEG 2 and 2.5, at half and a quarter of its rates
    kilobits = (_KILOBITS if first else _LOW_KILOBITS)[bitrate - 1]
    hertz = (44100, 48000, 32000)[rate] >> (0 if first else 1 if version == 2 else 2)
    return (144 if first else 72) * 1000 * kilobits // hertz + (header[2] >> 1 & 1)


def _stating(head: bytes, count: int) -> bytes:
    """A frame like that of `head` which has no sound, but the number of frames."""
    header = bytes([0xFF, head[1] | 1, 9 << 4 | head[2] & 0x0C, head[3]])  # no checksum, of a size for what follows
    first, mono = head[1] >> 3 & 3 == 3, head[3] >> 6 == 3
    side = (17 if mono else 32) if first else (9 if mono else 17)
    frame = header + bytes(side) + b"Xing" + struct.pack(">II", 1, count)
    return frame.ljust(_frame_length(header), b"\0")

"""Picture files before they are decoded: their format by content, and the claims that decoders believe unchecked.

Pillow checks the size in a header only after some decoders have run, and trusts the other numbers: a few hundred bytes
can ask for gigabytes or for hours. The checks here read no pixels.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from typing import BinaryIO

MOST_PIXELS = 50_000_000  # the largest photos of phones have 48.8 million; the model sees at most 7.2 million
TOO_LARGE = f"it is too large: the limit is {MOST_PIXELS:,} pixels in all; make it smaller first"
MOST_BYTES = 2**28  # of a file: 50 million pixels without compression have 150 MB
_MOST_DECODING_BYTES = 320_000_000  # while a file is decoded
_MOST_SCANS = 50  # of a progressive JPEG; encoders write about ten, and each is decoded over the whole picture
_MOST_ICONS = 100
_MOST_STRIPS = 100_000  # of a TIFF; each costs Pillow some hundred bytes
_MOST_TAGS = 4096
_MOST_SAMPLES = 6  # of a pixel of a TIFF: CMYK with two more
_MOST_PLAIN_BYTES = 2_000_000  # of a PPM in letters
_MOST_READS = 20_000  # of a decoder, and one more for each KiB: short records could keep it busy for minutes

# Bytes a pixel at the peak of Pillow's decoders, measured on 24 million pixels with Pillow 13. Progressive JPEGs hold
# all coefficients, WebP three copies of the canvas; both WebP and AVIF read the whole file too.
_DECODING_BYTES = {"JPEG": 4, "progressive JPEG": 10, "PNG": 4, "GIF": 4, "BMP": 4, "PPM": 4, "TIFF": 4, "ICO": 12,
                   "WebP": 16, "AVIF": 10}  # fmt: skip

_PNG = b"\x89PNG\r\n\x1a\n"
_SIGNATURES = [
    (b"\xff\xd8\xff", "JPEG"), (_PNG, "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"), (b"BM", "BMP"),
    (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"), (b"\0\0\1\0", "ICO"),
]  # fmt: skip
_OTHERS = [
    (b"%PDF-", "a PDF"), (b"%!PS", "PostScript"), (b"\xc5\xd0\xd3\xc6", "PostScript"), (b"8BPS", "a Photoshop file"),
    (b"<svg", "an SVG"), (b"<?xml", "XML, perhaps an SVG"), (b"<!doctype", "HTML"), (b"<html", "HTML"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"), (b"\xffO\xffQ", "JPEG 2000"), (b"\xff\n", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"), (b"ID3", "sound"), (b"OggS", "sound"), (b"fLaC", "sound"),
    (b"PK\3\4", "a ZIP file"),
]  # fmt: skip
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_PNG_CHANNELS = {2: 3, 4: 2, 6: 4}
_ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
_INFLATED_AT_ONCE = 2**20
_CUT_OFF = "it is cut off: it ends too early"
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")  # of a JPEG: a segment with a length, or the end
_STRIPS = {273, 279, 324, 325}  # tags of a TIFF: offsets and lengths of strips and tiles
# Width, height, bits, compression, turn, samples, rows of a strip, width and height of a tile.
_TIFF_TAGS = {256, 257, 258, 259, 274, 277, 278, 322, 323}
READ = "JPEG, PNG, GIF, WebP, AVIF, BMP, TIFF, PPM, ICO"


class UnreadablePicture(Exception):
    """The reason, in words, why a file is not decoded."""


class MeteredFile:
    """A file that refuses to be read in very many pieces; the methods that Pillow needs."""

    def __init__(self, file: BinaryIO):
        """Starts at the beginning of a file.

        Args:
            file: a seekable file.

        Raises:
            UnreadablePicture: the file is empty or too large.
        """
        self.size = file.seek(0, os.SEEK_END)
        if not 0 < self.size <= MOST_BYTES:
            raise UnreadablePicture(
                f"it has {self.size:,} bytes; the limit is {MOST_BYTES:,}" if self.size else "it is empty"
            )
        self._file, self._left = file, _MOST_READS + self.size // 1024
        file.seek(0)

    def read(self, count: int = -1) -> bytes:
        """As of any file."""
        self._left -= 1
        if self._left < 0:
            raise UnreadablePicture("it consists of too many small parts")
        return self._file.read(count)

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        return self._file.seek(position, whence)

    def tell(self) -> int:
        """As of any file."""
        return self._file.tell()

    def at(self, position: int, count: int) -> bytes:
        """Bytes at a position.

        Raises:
            UnreadablePicture: the file ends before.
        """
        self.seek(position)
        data = self.read(count)
        if len(data) < count:
            raise UnreadablePicture(_CUT_OFF)
        return data


def picture_format(file: MeteredFile) -> str:
    """The format of a picture by its first bytes: one of `READ`, or HEIC.

    Raises:
        UnreadablePicture: it is none of them; says what the file is instead, if that is known.
    """
    file.seek(0)
    head = file.read(64)
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:1] == b"P" and head[1:2] in b"123456fF" and head[2:3].isspace():
        return "PPM"
    kind = "it is not a picture"
    if head[4:8] == b"ftyp":
        brands = {head[i : i + 4] for i in range(8, min(len(head), int.from_bytes(head[:4], "big")), 4)}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & _HEIC_BRANDS:
            return "HEIC"
        kind = "it is a film or sound, not a picture"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signature, name in _OTHERS:
        if text.startswith(signature.lower()):
            kind = f"it is {name}, not a picture"
    raise UnreadablePicture(f"{kind} in a format that can be read ({READ})")


def check_header(file: MeteredFile, kind: str) -> None:
    """Checks what a file of a format claims.

    Args:
        file: the file.
        kind: its format.

    Raises:
        UnreadablePicture: it is damaged, or decoding it would take too much time or memory.
    """
    if check := {"PNG": _check_png, "JPEG": _check_jpeg, "ICO": _check_ico, "TIFF": _check_tiff, "PPM": _check_ppm}.get(
        kind
    ):
        check(file)
    file.seek(0)


def check_size(width: int, height: int, kind: str | None = None, more: int = 0) -> None:
    """Checks that a picture is not too large.

    Args:
        width: in pixels, as the header claims.
        height: in pixels.
        kind: the format that it has to be decoded from; None for pixels in memory.
        more: bytes that decoding takes for other things than pixels.

    Raises:
        UnreadablePicture: it is too large or empty.
    """
    if not (width > 0 and height > 0):
        raise UnreadablePicture(f"it has {width} x {height} pixels")
    if width * height > MOST_PIXELS:
        raise UnreadablePicture(f"{TOO_LARGE}; it has {width:,} x {height:,}")
    needed = more + width * height * _DECODING_BYTES[kind] if kind else 0
    if needed > _MOST_DECODING_BYTES:
        raise UnreadablePicture(
            f"to decode a {kind} of {width:,} x {height:,} pixels takes {needed // 1_000_000:,} MB of memory; "
            f"the limit is {_MOST_DECODING_BYTES // 1_000_000} MB: make it smaller or save it as PNG"
        )


def _check_png(file: MeteredFile) -> None:
    """Checksums of all chunks and the number of pixels: Pillow takes missing ones for black."""
    header = file.at(8, 25)
    if header[4:8] != b"IHDR":
        raise UnreadablePicture("it is damaged: it does not begin with its header")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header[8:21])
    check_size(width, height, "PNG")
    missing = sum(
        rows * (1 + (columns * depth * _PNG_CHANNELS.get(colour, 1) + 7) // 8)
        for columns, rows in _png_passes(width, height, bool(interlaced))
        if columns
    )
    inflate, position, name = zlib.decompressobj(), 8, b""
    while name != b"IEND":
        length, name = struct.unpack(">I4s", file.at(position, 8))
        if length > file.size:
            raise UnreadablePicture(_CUT_OFF)
        data = file.at(position + 8, length + 4)
        if zlib.crc32(data[:length], zlib.crc32(name)) != int.from_bytes(data[length:], "big"):
            raise UnreadablePicture("it is damaged: a checksum is wrong")
        if name == b"IDAT":
            missing -= _inflated(inflate, data[:length], missing)
        position += length + 12
    if missing > 0:
        raise UnreadablePicture(_CUT_OFF)


def _png_passes(width: int, height: int, interlaced: bool) -> list[tuple[int, int]]:
    """Columns and rows of each pass."""
    if not interlaced:
        return [(width, height)]
    return [(-(-max(width - x, 0) // dx), -(-max(height - y, 0) // dy)) for x, y, dx, dy in _ADAM7]


def _inflated(inflate: zlib._Decompress, data: bytes, most: int) -> int:
    """The number of bytes that a piece of a stream inflates to, at most about `most`."""
    count = 0
    while data and count < most:
        count += len(inflate.decompress(data, _INFLATED_AT_ONCE))
        data = inflate.unconsumed_tail
    return count


def _check_jpeg(file: MeteredFile) -> None:
    """The size and the number of scans, each of which is decoded over the whole picture."""
    file.seek(0)
    data, position, scans = file.read(), 2, 0
    while (position := _next_marker(data, position)) >= 0:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xD9:
            return
        scans += marker == 0xDA
        if scans > _MOST_SCANS:
            raise UnreadablePicture(f"it has more than {_MOST_SCANS} scans: save it as a JPEG that is not progressive")
        if marker in (0xC0, 0xC1, 0xC2):
            height, width = struct.unpack(">HH", data[position + 5 : position + 9].ljust(4, b"\0"))
            check_size(width, height, "progressive JPEG" if marker == 0xC2 else "JPEG")
        position += 2 + length


def _next_marker(data: bytes, position: int) -> int:
    """Position of the next marker of a JPEG, after the pixels of a scan; -1 if there is none."""
    found = _MARKER.search(data, position)
    return found.start() if found else -1


def _check_ico(file: MeteredFile) -> None:
    """The sizes of the pictures inside, which need not be those of the directory."""
    count = int.from_bytes(file.at(4, 2), "little")
    if count > _MOST_ICONS:
        raise UnreadablePicture(f"it holds {count:,} icons; the limit is {_MOST_ICONS}")
    for index in range(count):
        (offset,) = struct.unpack("<I", file.at(6 + 16 * index + 12, 4))
        head = file.at(offset, 24)
        png = head.startswith(_PNG)
        width, height = struct.unpack(">II", head[16:24]) if png else struct.unpack("<ii", head[4:12])
        check_size(width, height if png else abs(height) // 2, "ICO")  # a bitmap has its transparency below


def _check_tiff(file: MeteredFile) -> None:
    """The first page: its size, its strips or tiles, and their number."""
    order, big = "<" if file.at(0, 1) == b"I" else ">", 43 in file.at(2, 2)
    wide, narrow, entry = ("Q", "Q", 20) if big else ("I", "H", 12)

    def numbers(form: str, position: int) -> tuple[int, ...]:
        return struct.unpack(order + form, file.at(position, struct.calcsize(order + form)))

    (start,) = numbers(wide, 8 if big else 4)
    (count,) = numbers(narrow, start)
    if not 0 < count <= _MOST_TAGS:
        raise UnreadablePicture(f"its first page has {count:,} tags; from 1 to {_MOST_TAGS} are read")
    tags: dict[int, int] = {}
    for index in range(count):
        place = start + struct.calcsize(order + narrow) + index * entry
        tag, kind, length = numbers("HH" + wide, place)
        form = {3: "H", 4: "I", 16: "Q"}.get(kind)
        if tag in _STRIPS and length > _MOST_STRIPS:
            raise UnreadablePicture(f"it has {length:,} strips; the limit is {_MOST_STRIPS:,}")
        if form and length:
            value = place + entry - (8 if big else 4)
            inside = struct.calcsize(order + form) * length <= (8 if big else 4)
            if tag in _TIFF_TAGS:
                (tags[tag],) = numbers(form, value if inside else numbers(wide, value)[0])
    if tags.get(277, 1) > _MOST_SAMPLES:
        raise UnreadablePicture(f"it has {tags[277]:,} samples a pixel; the limit is {_MOST_SAMPLES}")
    width, height = tags.get(256, 0), tags.get(257, 0)
    block = tags.get(322, width) * tags.get(323, min(tags.get(278, height), height))
    samples = max(-(-tags.get(277, 1) * tags.get(258, 1) // 8), 4)
    more = block * samples + file.size if tags.get(259, 1) != 1 else 0
    turned = 4 * width * height if tags.get(274, 1) != 1 else 0  # Pillow turns a copy
    check_size(width, height, "TIFF", more + turned)


def _check_ppm(file: MeteredFile) -> None:
    """Numbers in letters are decoded in Python, a million in a second."""
    if file.at(1, 1) in b"123" and file.size > _MOST_PLAIN_BYTES:
        raise UnreadablePicture(f"it is a plain PPM of {file.size:,} bytes; the limit is {_MOST_PLAIN_BYTES:,}")

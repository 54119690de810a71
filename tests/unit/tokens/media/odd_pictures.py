"""Odd, damaged and hostile picture files, made on the spot; each with what is right about it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> PIL.Image.Image:
    """A picture whose left half is red and whose right half is blue."""
    image = PIL.Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def noise(size: tuple[int, int] = (64, 48)) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))


def saved(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def png(
    width: int,
    height: int,
    *,
    depth: int = 8,
    colour: int = 2,
    interlace: int = 0,
    rows: bytes | None = None,
    stream: bytes | None = None,
    before: bytes = b"",
) -> bytes:
    """A PNG of black, or of given rows or their compressed stream, with chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    plain = bytes((1 + (width * bits + 7) // 8) * height) if rows is None else rows
    pixels = chunk(b"IDAT", zlib.compress(plain, 9) if stream is None else stream)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels + chunk(b"IEND", b"")


def claimed_png(width: int, height: int, **options: Any) -> bytes:
    return png(width, height, rows=bytes(1000), **options)


def tiff(tags: dict[int, tuple[int, int]], data: bytes = b"", order: str = "<", count: int | None = None) -> bytes:
    """One page: tag -> (type, value), then the data at byte 1000."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    page = struct.pack(order + "H", len(tags) if count is None else count)
    for tag, (kind, value) in sorted(tags.items()):
        field = struct.pack(order + ("HH" if kind == 3 else "I"), *((value, 0) if kind == 3 else (value,)))
        page += struct.pack(order + "HHI", tag, kind, 1) + field
    return (head + page + bytes(4)).ljust(1000, b"\0") + data


def tiff_page(width: int, height: int, data: bytes = b"", compression: int = 1, **more: tuple[int, int]) -> bytes:
    tags = {256: (4, width), 257: (4, height), 258: (3, 8), 259: (3, compression), 262: (3, 1), 273: (4, 1000),
            277: (3, 1), 278: (4, height), 279: (4, len(data))}  # fmt: skip
    return tiff({**tags, **{int(tag[1:]): value for tag, value in more.items()}}, data)


def bitmap(width: int, height: int, bits: int = 24, data: bytes = b"", compression: int = 0, offset: int = 54) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, offset) + info + data


def ico(inside: bytes, count: int = 1, bits: int = 32) -> bytes:
    entry = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, bits, len(inside), 6 + 16 * count)
    return struct.pack("<HHH", 0, 1, count) + entry * count + inside


def gif(width: int, height: int, frame: tuple[int, int, int, int], before: bytes = b"") -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return head + before + b"," + struct.pack("<HHHHB", *frame, 0) + b"\x02\x02\x44\x01\x00;"


def webp(width: int, height: int) -> bytes:
    canvas = struct.pack("<B3x", 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    inside = saved(noise((16, 16)), "WEBP", lossless=True)[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + inside
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_scans(count: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = saved(noise(size), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def jpeg_claims(width: int, height: int, progressive: bool = False) -> bytes:
    data = bytearray(saved(noise(), "JPEG", progressive=progressive))
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def flipped(data: bytes, at: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def animation(kind: str) -> bytes:
    return saved(halves(), kind, save_all=True, append_images=[PIL.Image.new("RGB", (64, 48), "lime")] * 3)


def exif(orientation: int, **options: Any) -> bytes:
    made = PIL.Image.Exif()
    made[0x0112] = orientation
    return saved(halves(), options.pop("kind", "JPEG"), exif=made, **options)


def sixteen_bits() -> bytes:
    """A grey ramp of 16 bits from black to white."""
    return saved(PIL.Image.fromarray(np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (64, 1))), "PNG")


def many_comments(blocks: int) -> bytes:
    return gif(8, 8, (0, 0, 8, 8), b"!\xfe" + (b"\xff" + bytes(255)) * blocks + b"\0")


Made = Callable[[], bytes]

# Read, and seen as a red left half and a blue right half (HALVES), or just read (TAKEN).
HALVES: dict[str, Made] = {
    "png": lambda: saved(halves(), "PNG"),
    "jpeg": lambda: saved(halves(), "JPEG", quality=95),
    "progressive jpeg": lambda: saved(halves(), "JPEG", quality=95, progressive=True),
    "gif": lambda: saved(halves(), "GIF"),
    "webp": lambda: saved(halves(), "WEBP", lossless=True),
    "avif": lambda: saved(halves(), "AVIF", quality=95),
    "bmp": lambda: saved(halves(), "BMP"),
    "ppm": lambda: saved(halves(), "PPM"),
    "tiff": lambda: saved(halves(), "TIFF"),
    "tiff lzw": lambda: saved(halves(), "TIFF", compression="tiff_lzw"),
    "tiff deflate": lambda: saved(halves(), "TIFF", compression="tiff_adobe_deflate"),
    "tiff jpeg": lambda: saved(halves(), "TIFF", compression="jpeg", quality=95),
    "tiff cmyk": lambda: saved(halves("CMYK"), "TIFF"),
    "big tiff": lambda: saved(halves(), "TIFF", big_tiff=True),
    "ico": lambda: saved(halves(size=(64, 64)), "ICO", sizes=[(64, 64), (16, 16)]),
    "ico of a bitmap": lambda: saved(halves(size=(64, 64)), "ICO", sizes=[(64, 64)], bitmap_format="bmp"),
    "palette png": lambda: saved(halves("P"), "PNG"),
    "palette with transparency": lambda: saved(halves("P"), "PNG", transparency=bytes(range(256))),
    "rgba png": lambda: saved(halves("RGBA"), "PNG"),
    "cmyk jpeg": lambda: saved(halves("CMYK"), "JPEG", quality=95),
    "16-bit rgb": lambda: png(
        64, 48, depth=16, rows=(b"\0" + (b"\xff\xff" + bytes(4)) * 32 + (bytes(4) + b"\xff\xff") * 32) * 48
    ),
    "interlaced png": lambda: png(8, 8, interlace=1, rows=b"".join(
        (b"\0" + b"".join(bytes(RED if x0 + dx * i < 4 else BLUE) for i in range(-(-(8 - x0) // dx))))
        * -(-(8 - y0) // dy)
        for x0, y0, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
                               (0, 1, 1, 2))
    )),
    "animated gif": lambda: animation("GIF"),
    "animated webp": lambda: animation("WEBP"),
    "animated png": lambda: animation("PNG"),
    "animated avif": lambda: animation("AVIF"),
    "pages of a tiff": lambda: animation("TIFF"),
    "mpo": lambda: animation("MPO"),
    "png with text": lambda: png(8, 8, rows=(b"\0" + bytes(RED) * 4 + bytes(BLUE) * 4) * 8,
                                 before=chunk(b"tEXt", b"Comment\0" + b"a" * 5000)),
    "bytes after the end of a png": lambda: saved(halves(), "PNG") + bytes(1000),
    "bytes after the end of a jpeg": lambda: saved(halves(), "JPEG", quality=95) + b"\xff\xda" * 1000,
    "jpeg with a damaged exif": lambda: saved(halves(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "exif that says 9": lambda: exif(9, quality=95),
    "exif that says 0": lambda: exif(0, quality=95),
}  # fmt: skip
TAKEN: dict[str, Made] = {
    "1 bit": lambda: saved(halves("1"), "PNG"),
    "grey": lambda: saved(halves("L"), "PNG"),
    "grey with alpha": lambda: saved(halves("LA"), "PNG"),
    "16-bit pgm": lambda: b"P5 16 16 65535\n" + bytes(512),
    "plain ppm": lambda: b"P3 16 16 255\n" + b"255 0 0 " * 256,
    "float tiff": lambda: saved(PIL.Image.fromarray(np.full((32, 32), 0.5, np.float32)), "TIFF"),
    "top-down bmp": lambda: bitmap(16, -16, data=bytes(16 * 48)),
    "gif with a frame beyond its canvas": lambda: (lambda data: data[:6] + struct.pack("<HH", 8, 8) + data[10:])(
        saved(noise(), "GIF")
    ),
}

# Refused in one line that has these words.
REFUSED: dict[str, tuple[Made, str]] = {
    "empty": (lambda: b"", "it is empty"),
    "zeros": (lambda: bytes(5000), "not a picture"),
    "text": (lambda: b"just words", "not a picture"),
    "html": (lambda: b"<!DOCTYPE html><html><img src=x></html>", "HTML"),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "SVG"),
    "xml": (lambda: b'<?xml version="1.0"?><svg/>', "SVG"),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
    "psd": (lambda: b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 9, 9, 8, 3) + bytes(999), "Photoshop"),
    "pdf": (lambda: b"%PDF-1.7\n", "PDF"),
    "jpeg 2000": (lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "JPEG 2000"),
    "heic": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC"),
    "mp4": (lambda: b"\0\0\0\x18ftypisom\0\0\0\0isommp41" + bytes(99), "film"),
    "wav": (lambda: b"RIFF\x24\0\0\0WAVEfmt " + bytes(99), "not a picture"),
    "zip": (lambda: b"PK\3\4" + bytes(99), "ZIP"),
    "half a png": (lambda: (lambda data: data[: len(data) // 2])(saved(noise(), "PNG")), "ends too early"),
    "png without its end": (lambda: saved(noise(), "PNG")[:-12], "ends too early"),
    "half a jpeg": (lambda: (lambda data: data[: len(data) // 2])(saved(noise(), "JPEG")), "cut off"),
    "jpeg of a header": (lambda: saved(noise(), "JPEG")[:200], "cut off"),
    "half a gif": (lambda: (lambda data: data[: len(data) // 2])(saved(noise(), "GIF")), "cut off"),
    "half a webp": (lambda: (lambda data: data[: len(data) // 2])(saved(noise(), "WEBP")), "cut off"),
    "half an avif": (lambda: (lambda data: data[: len(data) // 2])(saved(noise(), "AVIF")), "cut off"),
    "half a bmp": (lambda: (lambda data: data[: len(data) // 2])(saved(noise(), "BMP")), "cut off"),
    "half a ppm": (lambda: (lambda data: data[: len(data) // 2])(saved(noise(), "PPM")), "cut off"),
    "half a tiff": (lambda: tiff_page(64, 64, bytes(64 * 32)), "cut off"),
    "half an lzw tiff": (lambda: saved(noise(), "TIFF", compression="tiff_lzw")[:3000], "cut off"),
    "half an ico": (lambda: saved(noise((64, 64)), "ICO", sizes=[(64, 64)], bitmap_format="bmp")[:3000], "cut off"),
    "two bytes": (lambda: b"\xff\xd8", "not a picture"),
    "three bytes of a jpeg": (lambda: b"\xff\xd8\xff", "cut off"),
    "a bad checksum of pixels": (lambda: flipped(saved(noise(), "PNG"), 100), "checksum"),
    "a bad checksum of the header": (lambda: flipped(saved(noise(), "PNG"), 24), "checksum"),
    "pixels that do not inflate": (lambda: png(9, 9, stream=b"nonsense"), "damaged"),
    "too few pixels": (lambda: png(64, 64, rows=bytes(193 * 10)), "cut off"),
    "an interlaced png of too few pixels": (lambda: png(64, 64, interlace=1, rows=bytes(200)), "cut off"),
    "a bad checksum of the stream": (lambda: png(9, 9, stream=flipped(zlib.compress(bytes(252)), -1)), "damaged"),
    "png without pixels": (lambda: png(9, 9, stream=b""), "cut off"),
    "png of 0 x 9": (lambda: claimed_png(0, 9), "0 x 9 pixels"),
    "jpeg of 0 x 9": (lambda: jpeg_claims(0, 9), "0 x 9 pixels"),
    "png of 4 billion": (lambda: claimed_png(2**31 - 1, 2**31 - 1), "limit is 50,000,000"),
    "png of 900 million": (lambda: claimed_png(30_000, 30_000), "limit is 50,000,000"),
    "png of 100 million": (lambda: claimed_png(10_000, 10_000), "limit is 50,000,000"),
    "interlaced giant": (lambda: claimed_png(20_000, 20_000, interlace=1), "limit is 50,000,000"),
    "16-bit giant": (lambda: claimed_png(20_000, 20_000, depth=16, colour=6), "limit is 50,000,000"),
    "1-bit giant": (lambda: claimed_png(100_000, 100_000, depth=1, colour=0), "limit is 50,000,000"),
    "jpeg giant": (lambda: jpeg_claims(65_500, 65_500), "limit is 50,000,000"),
    "progressive giant": (lambda: jpeg_claims(7_000, 7_000, True), "490 MB"),
    "gif giant": (lambda: gif(65_535, 65_535, (0, 0, 8, 8)), "limit is 50,000,000"),
    "gif with a giant frame": (lambda: gif(8, 8, (0, 0, 65_535, 65_535)), "limit is 50,000,000"),
    "webp giant": (lambda: webp(16_383, 16_383), "limit is 50,000,000"),
    "bmp giant": (lambda: bitmap(60_000, 60_000), "limit is 50,000,000"),
    "bmp of negative width": (lambda: bitmap(-8, 8, data=bytes(192)), "too large"),
    "bmp of a run length": (lambda: bitmap(60_000, 60_000, 8, b"\xff\0" * 50, 1, 54 + 1024), "limit is 50,000,000"),
    "ppm giant": (lambda: b"P6 60000 60000 255\n" + bytes(99), "limit is 50,000,000"),
    "ppm of a long number": (lambda: b"P6 " + b"9" * 5000 + b" 1 255\n", "damaged"),
    "plain ppm of megabytes": (lambda: b"P3 1000 1000 255\n" + b"0 " * 1_200_000, "plain PPM"),
    "tiff giant": (lambda: tiff_page(60_000, 60_000), "limit is 50,000,000"),
    "tiff with a giant tile": (
        lambda: tiff_page(
            16, 16, zlib.compress(bytes(999)), 8, t322=(4, 60_000), t323=(4, 60_000), t324=(4, 1000), t325=(4, 9)
        ),
        "of memory",
    ),
    "tiff of 65,535 tags": (lambda: tiff({256: (4, 9)}, count=65_535), "tags"),
    "tiff with a page beyond its end": (lambda: b"II*\0\xff\xff\xff\x7f", "ends too early"),
    "tiff of 65,535 samples": (lambda: tiff_page(16, 16, bytes(999), t277=(3, 65_535)), "samples a pixel"),
    "ico with a giant png": (lambda: ico(claimed_png(20_000, 20_000)), "limit is 50,000,000"),
    "ico with a large png": (lambda: ico(claimed_png(6_000, 6_000)), "432 MB"),
    "ico with a giant bitmap": (lambda: ico(bitmap(20_000, 40_000)[14:]), "limit is 50,000,000"),
    "ico of 65,535 icons": (lambda: ico(b"", 65_535), "icons"),
    "ico of none": (lambda: struct.pack("<HHH", 0, 1, 0) + bytes(99), "damaged"),
    "jpeg of 300 scans": (lambda: jpeg_scans(300), "scans"),
    "png of many chunks": (lambda: png(8, 8, before=chunk(b"tEXt", b"a\0b") * 50_000), "small parts"),
    "gif of many comments": (lambda: many_comments(40_000), "small parts"),
    "png with a bomb of text": (
        lambda: png(8, 8, before=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9))), "damaged"
    ),
    "avif of a header": (lambda: b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(99), "damaged"),
}  # fmt: skip

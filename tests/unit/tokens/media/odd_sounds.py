"""Odd sound files, made on the spot: those that are taken, and those that are refused with the words that say why."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np

Made = Callable[[], bytes]

RATE = 16_000
SECONDS = 2


def tone(rate: int = RATE, seconds: float = SECONDS) -> np.ndarray:
    """440 and 1,000 Hz."""
    time = np.arange(round(rate * seconds)) / rate
    return 0.2 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 1000 * time + 1)


def encoded(form: str = "WAV", subtype: str | None = None, wave: np.ndarray | None = None, rate: int = RATE) -> bytes:
    """A file of `wave`, by default of `tone`."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, tone(rate) if wave is None else wave, rate, format=form, subtype=subtype)
    return file.getvalue()


def changed(data: bytes, position: int, new: bytes) -> bytes:
    """The data with other bytes at a position."""
    return data[:position] + new + data[position + len(new) :]


def with_size(form: str, chunk: bytes, size: bytes, *, whole: bool = False) -> bytes:
    """A file with another size of its sound, and of the whole."""
    data = encoded(form)
    data = changed(data, data.index(chunk) + 4, size)
    return changed(data, 4, size) if whole else data


def wave_field(offset: int, layout: str, value: int) -> bytes:
    """A WAV file with another number in its header."""
    return changed(encoded(), offset, struct.pack(layout, value))


def noisy(data: bytes, place: float = 0.5, count: int = 64) -> bytes:
    """The data with bytes of noise in it."""
    noise = np.random.default_rng(0).integers(0, 256, count, dtype=np.uint8).tobytes()
    return changed(data, int(len(data) * place), noise)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def noise(count: int) -> bytes:
    return np.random.default_rng(1).integers(0, 256, count, dtype=np.uint8).tobytes()


def with_sample(value: float) -> bytes:
    wave = tone()
    wave[1234] = value
    return encoded("WAV", "FLOAT", wave)


def streamed_flac() -> bytes:
    """FLAC whose header does not know the number of samples."""
    data = encoded("FLAC")
    return changed(changed(data, 21, bytes([data[21] & 0xF0])), 22, bytes(4))


def with_tag(data: bytes) -> bytes:
    """Data behind an ID3 tag of 16 bytes."""
    return b"ID3\x04\0\0\0\0\0\x10" + bytes(16) + data


def without_count(data: bytes) -> bytes:
    """An MP3 file without its first frame, which tells the number of the others."""
    return data[data.index(b"\xff\xf3", 4) :]


TAKEN: dict[str, Made] = {
    "8 bits": lambda: encoded("WAV", "PCM_U8"),
    "16 bits, big-endian": lambda: encoded("AIFF"),
    "24 bits": lambda: encoded("WAV", "PCM_24"),
    "32 bits": lambda: encoded("WAV", "PCM_32"),
    "floats": lambda: encoded("WAV", "FLOAT"),
    "doubles": lambda: encoded("CAF", "DOUBLE"),
    "mu-law": lambda: encoded("WAV", "ULAW"),
    "A-law": lambda: encoded("AIFF", "ALAW"),
    "FLAC": lambda: encoded("FLAC"),
    "MP3": lambda: encoded("MP3"),
    "MP3 at 44.1 kHz": lambda: encoded("MP3", rate=44_100),
    "MP3 behind a tag": lambda: with_tag(encoded("MP3")),
    "MP3 behind a tag and zeros": lambda: with_tag(bytes(500) + encoded("MP3")),
    "MP3 before a tag": lambda: encoded("MP3") + b"TAG" + bytes(125),
    "FLAC behind a tag": lambda: with_tag(encoded("FLAC")),
    "Vorbis": lambda: encoded("OGG", "VORBIS"),
    "Opus": lambda: encoded("OGG", "OPUS"),
    "Ogg before a tag": lambda: encoded("OGG") + b"TAG" + bytes(125),
    "CAF": lambda: encoded("CAF"),
    "RF64": lambda: encoded("RF64"),
    "192 kHz": lambda: encoded(rate=192_000),
    "6 channels": lambda: encoded(wave=np.repeat(tone()[:, None], 6, axis=1)),
    "a WAV of unknown size, all bits": lambda: with_size("WAV", b"data", b"\xff" * 4, whole=True),
    "a WAV of unknown size, 0": lambda: with_size("WAV", b"data", bytes(4), whole=True),
    "a WAV of unknown size, 2^31 - 1": lambda: with_size("WAV", b"data", b"\xff\xff\xff\x7f"),
    "a CAF of unknown size": lambda: with_size("CAF", b"data", b"\xff" * 8),
    "a FLAC of unknown size": streamed_flac,
    "a WAV without its byte of padding": lambda: encoded("WAV", "PCM_U8", tone()[:-1])[:-1],
    "a chunk before the sound": lambda: (data := encoded())[:36] + b"LIST\4\0\0\0abcd" + data[36:],
    "a name that is none": lambda: changed(encoded(), 16, encoded()[16:20]),
}

FORMATS_READ = "FLAC, MP3, Ogg, AIFF and CAF are read"

REFUSED: dict[str, tuple[Made, str]] = {
    "nothing": (lambda: b"", "is empty"),
    "text": (lambda: b"Hello, this is text. " * 50, FORMATS_READ),
    "UTF-16": (lambda: "Hello".encode("utf-16") * 50, FORMATS_READ),
    "HTML": (lambda: b"<!DOCTYPE html><html></html>" * 9, FORMATS_READ),
    "a PNG": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG picture"),
    "a ZIP": (lambda: b"PK\x03\x04" + bytes(99), "a ZIP archive"),
    "WebM": (lambda: b"\x1aE\xdf\xa3" + bytes(99), "WebM"),
    "an AVI": (lambda: changed(encoded(), 8, b"AVI "), FORMATS_READ),
    "noise": (lambda: noise(99_999), FORMATS_READ),
    "noise that begins as MP3": (lambda: b"\xff\xfb\x90\x64" + noise(5_000_000), "no MP3 follows"),
    "noise behind a tag": (lambda: with_tag(noise(5_000_000)), "no MP3 follows"),
    "a tag of 256 MB": (lambda: b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + encoded("MP3"), "no MP3 follows"),
    "MP3 that becomes noise": (lambda: encoded("MP3")[:3000] + noise(5_000_000), "damaged"),
    "half a WAV": (lambda: half(encoded()), "is cut"),
    "half an AIFF": (lambda: half(encoded("AIFF")), "is cut"),
    "half a CAF": (lambda: half(encoded("CAF")), "is cut"),
    "half an RF64": (lambda: half(encoded("RF64")), "is cut"),
    "half a FLAC": (lambda: half(encoded("FLAC")), "damaged"),
    "half an MP3": (lambda: half(encoded("MP3")), "is cut"),
    "noise in an MP3": (lambda: noisy(encoded("MP3")), "cut or damaged"),
    "an MP3 and noise": (lambda: encoded("MP3") + noise(99_999), "damaged"),
    "half a Vorbis": (lambda: half(encoded("OGG")), "is cut"),
    "half an Opus": (lambda: half(encoded("OGG", "OPUS")), "is cut"),
    "noise in a FLAC": (lambda: noisy(encoded("FLAC")), "damaged"),
    "noise in a Vorbis": (lambda: noisy(encoded("OGG"), 0.8), "checksum"),
    "noise in an Opus": (lambda: noisy(encoded("OGG", "OPUS")), "checksum"),
    "a page that is none": (lambda: changed(data := encoded("OGG"), data.rindex(b"OggS"), b"Oggs"), "damaged"),
    "a WAV that announces 1 MB": (lambda: with_size("WAV", b"data", struct.pack("<I", 10**6)), "is cut"),
    "a CAF that announces 1 TB": (lambda: with_size("CAF", b"data", struct.pack(">q", 10**12)), "is cut"),
    "a header alone": (lambda: encoded()[:44], "is cut"),
    "half a header": (lambda: encoded()[:20], "no samples"),
    "no samples": (lambda: encoded(wave=np.zeros(0)), "0 samples"),
    "399 samples": (lambda: encoded(wave=tone()[:399]), "399 samples .* 400"),
    "199 samples at 8 kHz": (lambda: encoded(wave=tone()[:199], rate=8000), "199 samples .* 200"),
    "NaN": (lambda: with_sample(float("nan")), "NaN or infinite"),
    "infinity": (lambda: with_sample(float("-inf")), "NaN or infinite"),
    "a sample of 1e300": (
        lambda: encoded("WAV", "DOUBLE", np.where(np.arange(9999) == 5000, 1e300, 0)), "absurd",
    ),
    "7,999 Hz": (lambda: encoded(wave=tone(), rate=7999), "7,999 Hz"),
    "0 Hz": (lambda: wave_field(24, "<I", 0), "rate of 0 Hz"),
    "4 billion Hz": (lambda: wave_field(24, "<I", 4_000_000_000), "4,000,000,000 Hz"),
    "no channels": (lambda: wave_field(22, "<H", 0), "0 channels"),
    "65,535 channels": (lambda: wave_field(22, "<H", 65_535), "65,535 channels"),
    "1,000 channels": (lambda: wave_field(22, "<H", 1000), "1,000 channels"),
    "0 bits": (lambda: wave_field(34, "<H", 0), "cannot be decoded as WAV"),
    "31 minutes": (lambda: encoded("FLAC", wave=np.zeros(8000 * 60 * 31), rate=8000), "longer than 30 minutes"),
    "a FLAC that states 3 hours": (
        lambda: changed(encoded("FLAC"), 22, struct.pack(">I", RATE * 3600 * 3)), "longer than 30 minutes",
    ),
    "a FLAC that states too much": (lambda: changed(encoded("FLAC"), 22, struct.pack(">I", 3 * RATE)), "only 32,000"),
    "a FLAC that states too little": (lambda: changed(encoded("FLAC"), 22, struct.pack(">I", RATE)), "more than"),
    "two Oggs": (lambda: 2 * encoded("OGG"), "several recordings"),
    "m4a": (lambda: b"\0\0\0\x20ftypM4A " + bytes(99), "read on macOS alone.*ffmpeg"),
    "AAC": (lambda: b"\xff\xf1\x50\x80" + bytes(99), "read on macOS alone.*ffmpeg"),
}  # fmt: skip

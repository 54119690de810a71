"""Sound from files, bytes and arrays, decoded block by block."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from phi4_mlx.errors import RequestError
from phi4_mlx.files.regular_file import open_regular
from phi4_mlx.tokens.media.data_url import is_url, url_bytes
from phi4_mlx.tokens.media.sound_header import MOST_CHANNELS, Content, Kind, check_content, check_sound_format, kind_of
from phi4_mlx.tokens.media.sound_reader import SoundReader, without_decoder_notes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from soundfile import SoundFile

    from phi4_mlx.tokens.media.log_mel import Wave

Source = str | os.PathLike[str] | bytes | tuple[Any, Any]

_BLOCK = 2**16  # frames decoded at once
_CONVERTER = "afconvert"  # part of macOS
_CONVERTER_S = 600.0
_MP3_LOSS = 4 * 1152  # samples; of the first frames of a recorded stream, which build on earlier ones


@dataclass(frozen=True)
class Sound:
    """Sound that is ready to be decoded.

    Attributes:
        name: of its source, for messages.
        rate: its sample rate in Hz.
        seconds: its duration.
        blocks: decodes its samples, the channels averaged, from -1 to 1 (loud floats reach further); call it once.
    """

    name: str
    rate: int
    seconds: float
    blocks: Callable[[], Iterator[Wave]]


@contextlib.contextmanager
def open_sound(source: Source, longest_s: float | None = None) -> Iterator[Sound]:
    """Opens sound; nothing is decoded yet.

    Args:
        source: as for `read_audio`.
        longest_s: the longest duration in seconds; None for no limit.

    Raises:
        RequestError: the source is not sound that can be read, or is longer. While blocks are decoded: the file is
            damaged or cut, or a sample is not finite.
    """
    if isinstance(source, tuple):
        yield _limited(_from_array(source), longest_s)
        return
    if isinstance(source, str) and is_url(source):
        source = url_bytes(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = "the sound"
        file: BinaryIO = io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        name = f"{os.fspath(source)!s:.300}"
        try:
            file = open_regular(Path(source))
        except OSError as error:
            raise RequestError(f"{name} cannot be read: {error.strerror}") from None
    else:
        raise RequestError(
            f"sound must be a path, bytes, or (samples, rate in Hz), not {type(source).__name__}: {source!r:.60}"
        )
    with file:
        kind = kind_of(file, name)
        if kind is Kind.MPEG4:
            with _converted(file, name) as wave_file, _decoder(wave_file, Kind.CAF, name, longest_s) as sound:
                yield _limited(sound, longest_s)
        else:
            with _decoder(file, kind, name, longest_s) as sound:
                yield _limited(sound, longest_s)


def _limited(sound: Sound, longest_s: float | None) -> Sound:
    """The sound, if it is not longer than the limit."""
    if longest_s is not None and sound.seconds > longest_s:
        raise RequestError(
            f"{sound.name} is longer than {longest_s / 60:g} minutes, the limit here; `phi4-mlx transcribe` "
            "reads sound of any length"
        )
    return sound


@contextlib.contextmanager
def _decoder(file: BinaryIO, kind: Kind, name: str, longest_s: float | None) -> Iterator[Sound]:
    """Decodes a file with libsndfile."""
    content = check_content(file, kind, name)
    notes = without_decoder_notes if kind is Kind.MP3 else contextlib.nullcontext

    @contextlib.contextmanager
    def decoding(after: str) -> Iterator[None]:
        import soundfile

        try:
            with notes():
                yield
        except soundfile.SoundFileError as error:
            raise RequestError(f"{name} {after}: {_reason(error)}; make it again, or convert it to WAV") from None

    with decoding(f"cannot be decoded as {kind.value}"):
        decoder = _open(file, content)
    with decoder:
        rate = decoder.samplerate
        check_sound_format(name, rate, decoder.channels)
        frames = content.frames or (decoder.frames if decoder.frames < 2**36 - 1 else None)
        if frames is None:  # FLAC that was streamed: counted first, which is much faster than features are
            with decoding("is damaged"), _open(file, content) as counter:
                frames = 0
                while (longest_s is None or frames <= longest_s * rate) and (
                    read := len(counter.read(4 * _BLOCK, "int16"))
                ):
                    frames += read

        def blocks() -> Iterator[Wave]:
            count = 0
            while True:
                with decoding(f"is damaged after {count / rate:.1f} s"):
                    block = decoder.read(_BLOCK, dtype="float64", always_2d=True)
                if not len(block):
                    break
                count += len(block)
                if count > frames:
                    raise RequestError(f"{name} is damaged: it has more than the {frames:,} samples that it announces")
                yield _mean(block, name)
            if frames - count > (_MP3_LOSS if kind is Kind.MP3 else 0):
                raise RequestError(
                    f"{name} is damaged or cut: only {count:,} of {frames:,} samples can be decoded; make or copy it "
                    "again"
                )

        yield Sound(name, rate, frames / rate, blocks)


def _open(file: BinaryIO, content: Content) -> SoundFile:
    """A decoder of a file, at its start."""
    import soundfile

    class Decoder(soundfile.SoundFile):
        def seekable(self) -> bool:
            """False: after each block soundfile would seek to where it is, which fails in some files."""
            return False

    return Decoder(SoundReader(file, content.splice))


def _reason(error: Exception) -> str:
    """The reason of libsndfile, without its prefix."""
    text = str(getattr(error, "error_string", error))
    if "does not exist" in text:  # its words for what its MP3 decoder refuses
        return "its content is damaged"
    return text.removeprefix("Error : ").removeprefix("Internal error : ").rstrip(".") or "unknown error"


def _mean(block: NDArray[np.float64], name: str) -> Wave:
    """The mean of the channels of a block [n, channels]."""
    import numpy as np

    if not np.isfinite(block).all():
        raise RequestError(f"{name} has a sample that is NaN or infinite; its recording or conversion went wrong")
    wave: Wave = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
    return wave


def _from_array(source: tuple[Any, ...]) -> Sound:
    """Sound in memory: (samples, rate)."""
    import numpy as np

    name = "the sound"
    if len(source) != 2 or isinstance(source[0], (int, float)):
        raise RequestError("sound in memory must be (samples, rate in Hz), with the samples first")
    rate = source[1]
    try:
        is_whole = not isinstance(rate, (bool, np.bool_)) and int(rate) == rate
    except (ValueError, TypeError, OverflowError):
        is_whole = False
    if not is_whole:
        raise RequestError(f"the sample rate must be a whole number of Hz, not {rate!r:.60}")
    try:
        wave = np.asarray(source[0])
    except (ValueError, TypeError, RuntimeError) as error:
        raise RequestError(f"samples must be numbers [n] or [n, channels]: {error}") from None
    if wave.ndim not in (1, 2):
        raise RequestError(f"samples must have the shape [n] or [n, channels], not {list(wave.shape)}")
    scales = {"u1": (128, 128), "i2": (0, 2**15), "i4": (0, 2**31)}
    if wave.dtype.kind != "f" and wave.dtype.str[1:] not in scales:
        raise RequestError(f"samples must be floats from -1 to 1, or uint8, int16 or int32, not {wave.dtype}")
    channels = wave.shape[1] if wave.ndim == 2 else 1
    if channels > MOST_CHANNELS:
        raise RequestError(
            f"samples must have the shape [n] or [n, channels], up to {MOST_CHANNELS}, not {list(wave.shape)}"
        )
    check_sound_format(name, int(rate), channels)
    zero, scale = scales.get(wave.dtype.str[1:], (0, 1))
    columns = wave.reshape(len(wave), channels)

    def blocks() -> Iterator[Wave]:
        for start in range(0, len(columns), _BLOCK):
            yield _mean((columns[start : start + _BLOCK].astype(np.float64) - zero) / scale, name)

    return Sound(name, int(rate), len(wave) / int(rate), blocks)


@contextlib.contextmanager
def _converted(file: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """The sound of an MPEG-4 or AAC file as CAF, by the converter of macOS."""
    converter = shutil.which(_CONVERTER)
    if converter is None:
        raise RequestError(
            f"{name} is MPEG-4 or AAC sound, which is read on macOS alone; convert it, for example with "
            "`ffmpeg -i FILE.m4a FILE.wav`"
        )
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.m4a", Path(folder) / "made.caf"
        file.seek(0)
        with given.open("wb") as copy:
            shutil.copyfileobj(file, copy)
        command = [converter, "-f", "caff", "-d", "LEI16", str(given), str(made)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_CONVERTER_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is None or done.returncode or not made.is_file():
            raise RequestError(f"{name} cannot be decoded: {_CONVERTER} refuses it; convert it to WAV")
        with made.open("rb") as wave_file:
            yield wave_file

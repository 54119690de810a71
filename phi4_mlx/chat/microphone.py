"""Recording from the microphone, into a WAV file of its own."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media.audio import LONGEST_S

RATE = 16_000  # Hz, the rate that the model reads
_POLL_S = 0.1


def record(folder: Path, show: Callable[[float], object]) -> Path:
    """Records until the person presses Enter, or as long as the model hears.

    Args:
        folder: for the file; made if it is missing, readable by its owner only.
        show: called with the seconds so far.

    Returns:
        A new WAV file: mono, 16 bits, `RATE`.

    Raises:
        RequestError: there is no recorder or no microphone, or nothing was recorded.
        KeyboardInterrupt: Ctrl-C; nothing is written.
    """
    blocks: list[bytes] = []
    with _microphone(lambda data, *_: blocks.append(bytes(data))):
        while (seconds := sum(map(len, blocks)) / (2 * RATE)) < LONGEST_S:
            show(seconds)
            if select.select([sys.stdin], [], [], _POLL_S)[0]:
                sys.stdin.readline()
                break
    if not blocks:
        raise RequestError("nothing was recorded; see whether the terminal may use the microphone")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / time.strftime("%Y-%m-%d-%H%M%S.wav")
    private = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(private, "wb") as file, wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE)
        sound.writeframes(b"".join(blocks))
    return path


@contextlib.contextmanager
def _microphone(callback: Callable[..., object]) -> Iterator[None]:
    """Records from the default microphone; `callback` gets each block of 16-bit samples, in a thread of its own."""
    try:
        import sounddevice
    except ModuleNotFoundError:
        raise RequestError("/record needs the package sounddevice: pip install 'sounddevice>=0.5'") from None
    except OSError as error:  # the library that it binds is missing
        raise RequestError(f"sounddevice cannot be used: {error}") from None
    try:
        stream = sounddevice.RawInputStream(samplerate=RATE, channels=1, dtype="int16", callback=callback)
        stream.start()
    except (sounddevice.PortAudioError, ValueError) as error:
        raise RequestError(f"there is no microphone that can be recorded from: {error}") from None
    try:
        yield
    finally:
        stream.close()

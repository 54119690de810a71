"""Sound as the model reads it: log-mel features, one token for every eight frames."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media.log_mel import WIDE, log_mel, window_of
from phi4_mlx.tokens.media.resample import resampled
from phi4_mlx.tokens.media.sound_file import Sound, Source, open_sound

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phi4_mlx.tokens.media.log_mel import Wave

TIME_REDUCTION = 8  # frames a token: the encoder halves the time three times
LONGEST_S = 30 * 60  # of one prompt, by the model's card; speech tasks are at their best up to 40 s


@dataclass(frozen=True, eq=False, repr=False)
class Audio:
    """Sound, ready for the model.

    Attributes:
        features: log-mel [T, 80], float32, one frame every 10 ms.
        seconds: the duration of the sound.
    """

    features: NDArray[np.float32]
    seconds: float

    kind: ClassVar[Literal["audio"]] = "audio"

    def __repr__(self) -> str:
        return f"<sound of {self.seconds:g} s, {self.tokens} tokens>"

    @property
    def tokens(self) -> int:
        """Tokens that the sound takes in a prompt."""
        return -(-len(self.features) // TIME_REDUCTION)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the features, in hexadecimal."""
        import numpy as np

        return hashlib.sha256(np.ascontiguousarray(self.features, "<f4").data).hexdigest()


def read_audio(source: Source | Audio) -> Audio:
    """Reads sound: resampled to 16 kHz, channels averaged; 8 kHz stays 8 kHz, as the model was trained on it.

    Args:
        source: a file's path, its bytes or a data: URL (WAV, FLAC, MP3, Ogg, AIFF, CAF; m4a on macOS); or (samples,
            rate in Hz), with samples [n] or [n, channels], floats from -1 to 1 or integers; or an `Audio`, which is
            returned as it is.

    Raises:
        RequestError: the source cannot be read or is damaged; the sound is longer than 30 minutes, shorter than 25 ms,
            has a rate under 8 kHz, or a sample that is not finite.
    """
    if isinstance(source, Audio):
        return source
    with open_sound(source, LONGEST_S) as sound:
        audio = heard(sound)
    return audio


def heard(sound: Sound) -> Audio:
    """The `Audio` of an open sound.

    Raises:
        RequestError: as for `read_audio`.
    """
    rate, blocks = resampled(sound.blocks(), sound.rate)
    return audio_of(blocks, rate, sound.name)


def audio_tokens(seconds: float) -> int:
    """Tokens that sound takes in a prompt, from its duration in seconds alone."""
    frames = (round(seconds * WIDE) - window_of(WIDE)) // (WIDE // 100) + 1
    return -(-max(frames, 0) // TIME_REDUCTION)


def audio_of(blocks: Iterable[Wave], rate: int, name: str) -> Audio:
    """The `Audio` of samples.

    Args:
        blocks: the samples in order, from -1 to 1; each [any number].
        rate: 16,000 or 8,000 Hz.
        name: of their source, for the message.

    Raises:
        RequestError: there are too few samples for one frame, or one is too large for its power to be finite.
    """
    import numpy as np

    count = 0

    def counted() -> Iterator[Wave]:
        nonlocal count
        for block in blocks:
            count += len(block)
            yield block

    with np.errstate(over="ignore", invalid="ignore"):  # the check below finds what overflows
        features = list(log_mel(counted(), rate))
    if not features:
        raise RequestError(
            f"{name} has {count:,} samples at {rate:,} Hz; the model needs at least {window_of(rate)}, which are 25 ms"
        )
    whole = np.concatenate(features)
    if not np.isfinite(whole).all():
        raise RequestError(f"{name} has a sample of absurd size; samples reach from -1 to 1")
    return Audio(whole, count / rate)

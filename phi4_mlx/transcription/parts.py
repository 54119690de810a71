"""Sound cut at its pauses into parts that are short enough for one prompt of a speech task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi4_mlx.tokens.media.audio import Audio, audio_of
from phi4_mlx.tokens.media.log_mel import window_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phi4_mlx.tokens.media.log_mel import Wave

LONGEST_S = 40.0  # of a speech task, by the model's card

_FRAME_S = 0.02
_PAUSE_S = 0.16  # longer than the closure of a consonant inside a word
_LONG_PAUSE_S = 1.0  # pauses from here on are equally good
_QUIETEST = 1e-3  # RMS of speech; what is softer everywhere (-60 dB of full scale) is silence
_MARGIN_S = 0.2  # of silence that stays before and after speech


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a sound, from its first speech to its last.

    Attributes:
        start: its place in the whole sound, in seconds.
        end: likewise.
        samples: [n], at `rate`.
        rate: 16,000 or 8,000 Hz.
    """

    start: float
    end: float
    samples: Wave
    rate: int

    def audio(self) -> Audio:
        """The part, ready for the model."""
        return audio_of([self.samples], self.rate, f"the part at {self.start:.1f} s")


def cut(blocks: Iterable[Wave], rate: int, longest_s: float = LONGEST_S) -> Iterator[Part]:
    """Cuts sound at its pauses; where a part has none, at its softest place. Silence makes no part.

    The same sound makes the same parts, however it comes in blocks. Memory is that of one part.

    Args:
        blocks: the samples in order, from -1 to 1; each [any number].
        rate: 16,000 or 8,000 Hz, as `resampled` returns it.
        longest_s: the longest part, in seconds.
    """
    import numpy as np

    longest, start = round(longest_s * rate), 0
    held = np.zeros(0)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > longest:
            end = _place_to_cut(held[:longest], rate)
            yield from _with_speech(held[:end], start, rate)
            held, start = held[end:], start + end
    yield from _with_speech(held, start, rate)


def _levels(samples: Wave, rate: int) -> NDArray[np.float64]:
    """RMS without the mean of every whole frame of 20 ms."""
    size = round(rate * _FRAME_S)
    levels: NDArray[np.float64] = samples[: len(samples) // size * size].reshape(-1, size).std(axis=1)
    return levels


def _place_to_cut(samples: Wave, rate: int) -> int:
    """The middle of the best pause: a long one, not early; the later one of equals."""
    import numpy as np

    decibels = 20 * np.log10(_levels(samples, rate) + 1e-6)
    soft, loud = np.percentile(decibels, [5, 90])
    quiet = np.concatenate([[0], decibels <= soft + 0.25 * (loud - soft), [0]])
    changes = np.flatnonzero(np.diff(quiet))

    def worth(pause: tuple[int, int]) -> tuple[bool, bool, int, int]:
        first, end = pause
        middle, length = (first + end) / 2, end - first
        long_enough = length >= _PAUSE_S / _FRAME_S
        return long_enough, middle >= len(decibels) / 4, min(length, round(_LONG_PAUSE_S / _FRAME_S)), first

    first, end = max(zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True), key=worth)
    place: int = max((first + end) // 2, 1) * round(rate * _FRAME_S)
    return place


def _with_speech(samples: Wave, start: int, rate: int) -> Iterator[Part]:
    """The part of the samples between their first and last sound; nothing if they are silence, or too few."""
    import numpy as np

    sounding = np.flatnonzero(_levels(samples, rate) >= _QUIETEST)
    if not len(sounding):
        return
    frame, margin = round(rate * _FRAME_S), round(rate * _MARGIN_S)
    first = max(int(sounding[0]) * frame - margin, 0)
    end = min((int(sounding[-1]) + 1) * frame + margin, len(samples))
    if end - first >= window_of(rate):
        yield Part((start + first) / rate, (start + end) / rate, samples[first:end], rate)

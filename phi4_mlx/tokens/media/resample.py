"""Resampling of sound to the rates that have features, by a windowed sinc in polyphase form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from phi4_mlx.tokens.media.log_mel import NARROW, WIDE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phi4_mlx.tokens.media.log_mel import Wave

# The passband ends and the stopband begins at the Nyquist frequency -+ 4 %: 7,690 Hz, the top of the highest band, and
# its mirror image, 8,310 Hz. Kaiser's formula gives the length of the filter for this width and attenuation.
_TRANSITION = 310 / 8000
_ATTENUATION_DB = 120.0
_BETA = 0.1102 * (_ATTENUATION_DB - 8.7)
_HALF = (_ATTENUATION_DB - 8) / (2 * 2.285 * 2 * math.pi * _TRANSITION)  # samples of the lower rate on each side
_BLOCK_S = 10  # seconds computed at once
_MOST_PHASES = 50_000  # of 80 MB of taps; only odd rates above 50 kHz need more, and are taken 10 us a second wrong
_PHASES = 256  # whose taps are computed at once


def resampled(blocks: Iterable[Wave], rate: int) -> tuple[int, Iterator[Wave]]:
    """Resamples sound to 16 kHz; sound at 8 kHz stays as it is.

    Args:
        blocks: the samples in order; each [any number].
        rate: their sample rate in Hz, at least 8,000.

    Returns:
        (the new rate, blocks of samples at that rate). The time is linear in the length, and the memory constant.
    """
    if rate in (NARROW, WIDE):
        return rate, iter(blocks)
    return WIDE, _polyphase(blocks, rate)


def _polyphase(blocks: Iterable[Wave], rate: int) -> Iterator[Wave]:
    """Samples at 16 kHz. Output m stands at input m * down / up, and is a sum of the taps of its phase, m % up."""
    import numpy as np

    ratio = Fraction(rate, WIDE).limit_denominator(max(_MOST_PHASES * WIDE // max(rate, WIDE), 1))
    filters = _filters(rate, ratio)
    up, down, around = ratio.denominator, ratio.numerator, filters.shape[1] - 1
    size = max(rate * _BLOCK_S // down, 1) * down + around  # whole periods of `down` inputs and `up` outputs
    waiting, held, total, done = [np.zeros(0)], 0, 0, 0
    for block in _extended(blocks, around // 2):
        total += len(block)
        held += len(block)
        waiting.append(block)
        if held >= size:
            inputs = np.concatenate(waiting)
            periods = (held - around) // down
            yield _outputs(inputs, filters, down, periods)
            waiting, held, done = [inputs[periods * down :]], held - periods * down, done + periods * up
    left = -((around - total) * up // down) - done
    periods = -(-left // up)
    waiting.append(np.zeros(max(periods * down + around - held, 0)))
    yield _outputs(np.concatenate(waiting), filters, down, periods)[:left]


def _extended(blocks: Iterable[Wave], half: int) -> Iterator[Wave]:
    """The samples, with `half` more before and after, mirrored at the first and the last one.

    Zeros there would make a step, which rings in the first and the last frames.
    """
    import numpy as np

    recent, begun = np.zeros(0), False
    for block in blocks:
        recent = np.concatenate([recent, block])
        if begun:
            yield block
        elif len(recent) > half:
            begun = True
            yield 2 * recent[0] - recent[half:0:-1]
            yield recent
        if begun:
            recent = recent[-half - 1 :]
    if begun:
        yield 2 * recent[-1] - recent[-2::-1]
    elif len(recent):
        yield np.pad(recent, half, "reflect", reflect_type="odd")


def _outputs(inputs: Wave, filters: NDArray[np.float64], down: int, periods: int) -> Wave:
    """The outputs [periods * up] of whole periods."""
    import numpy as np

    up, taps = filters.shape
    outputs = np.empty((periods, up))
    if periods:
        windows = np.lib.stride_tricks.sliding_window_view(inputs, taps)
        for phase, weights in enumerate(filters):
            first = phase * down // up
            rows = windows[first : first + (periods - 1) * down + 1 : down]
            # A product of BLAS would copy rows that overlap, and wait for its threads.
            outputs[:, phase] = np.einsum("ij,j->i", rows, weights)
    return outputs.reshape(-1)


def _filters(rate: int, ratio: Fraction) -> NDArray[np.float64]:
    """The taps [phases, 2 * half + 1] of every phase; the middle one is of the input at or left of the output."""
    import numpy as np

    cutoff = min(WIDE / rate, 1.0)  # of the input's Nyquist frequency
    half = math.ceil(_HALF / cutoff)
    phases, inputs = ratio.denominator, ratio.numerator
    offset = np.arange(phases) * inputs % phases / phases  # inputs between the middle tap and the output
    filters = np.empty((phases, 2 * half + 1))
    for start in range(0, phases, _PHASES):
        distance = np.arange(-half, half + 1) - offset[start : start + _PHASES, None]
        inside = np.maximum(1 - np.square(distance / half), 0)
        taps = np.sinc(cutoff * distance) * np.i0(_BETA * np.sqrt(inside)) * (inside > 0)
        filters[start : start + _PHASES] = taps / taps.sum(axis=1, keepdims=True)
    return filters

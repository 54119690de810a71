"""Resampling of sound to the rates that have features, by a windowed sinc in polyphase form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
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

    common = math.gcd(rate, WIDE)
    up, down = WIDE // common, rate // common
    filters = _filters(rate, up, down)  # [up, taps]
    taps = filters.shape[1]
    before = taps // 2 - 1  # inputs before the one at or left of the output
    step = max(rate * _BLOCK_S // down, 1)  # whole periods of `down` inputs and `up` outputs
    rest = np.zeros(before)
    waiting: list[Wave] = []
    held = before
    total = 0  # inputs
    for block in blocks:
        total += len(block)
        held += len(block)
        waiting.append(block)
        if held >= step * down + taps:
            rest = np.concatenate([rest, *waiting])
            periods = (len(rest) - taps) // down
            yield _outputs(rest, filters, down, periods)
            rest = rest[periods * down :]
            waiting, held = [], len(rest)
    rest = np.concatenate([rest, *waiting])
    done = (total + before - len(rest)) // down * up
    left = -(-total * up // down) - done
    periods = -(-left // up)
    rest = np.concatenate([rest, np.zeros(max(periods * down + taps - len(rest), 0))])
    yield _outputs(rest, filters, down, periods)[:left]


def _outputs(inputs: Wave, filters: NDArray[np.float64], down: int, periods: int) -> Wave:
    """The outputs [periods * up] of whole periods."""
    import numpy as np

    up, taps = filters.shape
    windows = np.lib.stride_tricks.sliding_window_view(inputs, taps)
    outputs = np.empty((periods, up))
    for phase in range(up):
        first = phase * down // up
        outputs[:, phase] = windows[first : first + periods * down : down][:periods] @ filters[phase]
    return outputs.reshape(-1)


def _filters(rate: int, up: int, down: int) -> NDArray[np.float64]:
    """The taps [up, taps] of every phase; the input at or left of the output has tap `taps // 2 - 1`."""
    import numpy as np

    cutoff = min(WIDE / rate, 1.0)  # of the input's Nyquist frequency
    half = math.ceil(_HALF / cutoff)
    offset = np.arange(-half + 1, half + 1) - (np.arange(up) * down % up / up)[:, None]  # inputs, from the output
    window = np.i0(_BETA * np.sqrt(np.maximum(1 - np.square(offset / half), 0))) / np.i0(_BETA)
    filters = np.sinc(cutoff * offset) * window
    gain: NDArray[np.float64] = filters / filters.sum(axis=1, keepdims=True)
    return gain

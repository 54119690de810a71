"""Log-mel features of sound, as the audio encoder of Phi-4-multimodal was trained on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Wave = NDArray[np.float64]  # [samples]

WIDE, NARROW = 16_000, 8_000  # sample rates in Hz that have features; narrow sound has no bands above 4 kHz
BANDS = 80

_FFT = 512  # at 16 kHz: a bin every 31.25 Hz, at 8 kHz too
_TOP_HZ = 7690
_TOP_BIN = int(_TOP_HZ * _FFT / WIDE + 0.5)  # bin 246 is below the top, but the original leaves it out
_PREEMPHASIS = 0.97
_SCALE = 32768  # samples as 16-bit numbers
_FRAMES = 512  # computed at once: 2 MB of windows


def window_of(rate: int) -> int:
    """Samples in a frame, 25 ms; sound with fewer has no features."""
    return rate // 40


def log_mel(blocks: Iterable[Wave], rate: int) -> Iterator[NDArray[np.float32]]:
    """Computes features block by block, in memory that does not depend on the length.

    Args:
        blocks: the samples in order, from -1 to 1; each [any number].
        rate: their sample rate in Hz, `WIDE` or `NARROW`.

    Yields:
        Features [frames, 80], one frame every 10 ms: the natural logarithm of the power in each band, at least 0. A
        frame is 25 ms from its start on; there is no padding, so the samples after the last whole frame are not used.

    Source: processing_phi4mm.py of Phi-4-multimodal-instruct, `Phi4MMAudioFeatureExtractor`.
    """
    import numpy as np

    window, hop = window_of(rate), rate // 100
    rest = np.zeros(0)
    for block in blocks:
        rest = np.concatenate([rest, block])
        if len(rest) < window:
            continue
        frames = np.lib.stride_tricks.sliding_window_view(rest, window)[::hop]  # [n, window]
        for start in range(0, len(frames), _FRAMES):
            yield _features(frames[start : start + _FRAMES], rate)
        rest = rest[len(frames) * hop :]


def _features(frames: NDArray[np.float64], rate: int) -> NDArray[np.float32]:
    """Features [n, 80] of frames [n, window]."""
    import numpy as np

    before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    emphasised = (frames - _PREEMPHASIS * before) * _SCALE
    fft = _FFT * rate // WIDE
    spectrum = np.fft.rfft(emphasised * np.hamming(frames.shape[1]), fft)
    bins = min(fft // 2, _TOP_BIN)  # the original drops the last bin of narrow sound, too
    power = np.square(spectrum.real[:, 1:bins]) + np.square(spectrum.imag[:, 1:bins])
    starts, centres, rising = _triangles()
    within = starts < bins - 1
    starts, centres = starts[within], centres[within]
    # A bin between two centres belongs to both triangles. Sums over so few bins are cheaper than a product of matrices.
    bands = np.zeros((len(frames), BANDS + 2))
    bands[:, centres + 1] = np.add.reduceat(power * rising[: bins - 1], starts, axis=1)
    bands[:, centres] += np.add.reduceat(power * (1 - rising[: bins - 1]), starts, axis=1)
    return np.log(np.maximum(bands[:, 1:-1], 1.0)).astype(np.float32)


@cache
def _triangles() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Triangles of height 1, linear in mel, over the bins from 1 on.

    Returns:
        (the first bin above a centre, less 1; that centre; the weight [245] of each bin in the triangle that rises)
    """
    import numpy as np

    def mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1127 * np.log1p(hertz / 700)

    place = mel(np.arange(1, _TOP_BIN) * WIDE / _FFT) / mel(np.array(float(_TOP_HZ))) * (BANDS + 1)
    centres, starts = np.unique(np.floor(place).astype(np.int64), return_index=True)
    return starts, centres, place - np.floor(place)

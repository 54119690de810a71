"""Bicubic interpolation without antialiasing, for the global view of a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_A = -0.75  # torch's coefficient of the cubic kernel
_TAPS = 4


def resize_bicubic(picture: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.float32]:
    """Resizes a picture to a square.

    Args:
        picture: bytes [H, W, C].
        side: pixels of the square's side.

    Returns:
        The square [side, side, C]; the kernel overshoots, so values may be below 0 and above 255.

    Source: torch's `interpolate(mode="bicubic", align_corners=False, antialias=False)`.
    """
    import numpy as np

    (rows, by_row), (columns, by_column) = (_taps(length, side) for length in picture.shape[:2])
    square = np.zeros((side, side, picture.shape[2]), np.float32)
    for y in range(_TAPS):  # one tap at a time, so that memory stays that of a few squares
        row = np.zeros_like(square)
        for x in range(_TAPS):
            row += by_column[None, :, x, None] * picture[np.ix_(rows[:, y], columns[:, x])]
        square += by_row[:, y, None, None] * row
    return square


def _taps(length: int, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Pixels [side, 4] that each result is made of, the edge repeated beyond it, and their weights [side, 4]."""
    import numpy as np

    centre = (np.arange(side) + 0.5) * (length / side) - 0.5
    first = np.floor(centre)
    fraction = centre - first
    weights = [_outer(fraction + 1), _inner(fraction), _inner(1 - fraction), _outer(2 - fraction)]
    taps = first[:, None].astype(np.int64) + np.arange(-1, _TAPS - 1)
    return np.clip(taps, 0, length - 1), np.stack(weights, 1).astype(np.float32)


def _inner(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The kernel up to a distance of 1."""
    return ((_A + 2) * x - (_A + 3)) * x * x + 1


def _outer(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The kernel at distances of 1 to 2."""
    return ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A

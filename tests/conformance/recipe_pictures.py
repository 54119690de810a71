"""Pictures of the golden global views: noise of a grid of crops, and the values that are stored."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CASES = {  # crop size -> grids (rows, columns)
    28: [(1, 1), (2, 3), (1, 36), (36, 1), (6, 6)],
    56: [(1, 1), (3, 1), (5, 7)],
    448: [(1, 2), (2, 1), (6, 6), (1, 36)],
}
STRIDE = 61  # of 448 x 448 x 3 values one in so many is stored


def name(crop: int, grid: tuple[int, int]) -> str:
    return f"{crop}/{grid[0]}x{grid[1]}"


def padded(crop: int, grid: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Noise with flat parts [H_t, W_t, 3], white in the last eighth."""
    rng = np.random.default_rng([crop, *grid])
    picture = rng.integers(0, 256, (crop * grid[0], crop * grid[1], 3), np.uint8)
    picture[: crop // 2, : crop // 2] = 77
    picture[:, -picture.shape[1] // 8 :] = 255
    return picture


def stored(view: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return view.ravel()[::STRIDE] if view.size > 60_000 else view.ravel()

"""The published image processor's rule in its own steps, slow and plain: grid, resize, padding, mask, crops, tokens.

Source: `dynamic_preprocess`, `find_closest_aspect_ratio` and the caller's count of tokens, in the image processor
published with Phi-4-multimodal-instruct. Written from its description with 14 pixels a patch; no torch.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
import PIL.Image


@cache
def ratios(most: int) -> list[tuple[int, int]]:
    """All grids of at most so many crops, by their number."""
    found = {(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= most}
    return sorted(found, key=lambda ratio: ratio[0] * ratio[1])


def target_ratio(width: int, height: int, crop: int, most: int) -> tuple[int, int]:
    """(columns, rows) of crops."""
    columns, rows = math.ceil(width / float(crop)), math.ceil(height / float(crop))
    if columns * rows <= most:
        return columns, rows
    best, best_difference = (1, 1), float("inf")
    for ratio in ratios(most):
        difference = abs(width / height - ratio[0] / ratio[1])
        if difference < best_difference:
            best_difference, best = difference, ratio
        elif difference == best_difference and width * height > 0.5 * crop * crop * ratio[0] * ratio[1]:
            best = ratio
    return best


def layout(
    width: int, height: int, crop: int, most: int
) -> tuple[tuple[int, int], tuple[int, int], npt.NDArray[np.bool_]]:
    """((new width, new height), (target width, target height), mask of patches)."""
    columns, rows = target_ratio(width, height, crop, most)
    target = crop * columns, crop * rows
    ratio_width, ratio_height = target[0] / width, target[1] / height
    if ratio_width < ratio_height:
        new = target[0], int(height * ratio_width)
        pad_right, pad_below = 0, target[1] - new[1]
    else:
        new = int(width * ratio_height), target[1]
        pad_right, pad_below = target[0] - new[0], 0
    mask = np.ones((crop // 14 * rows, crop // 14 * columns), bool)
    if pad_right >= 14:
        mask[:, -math.floor(pad_right / 14) :] = False
    if pad_below >= 14:
        mask[-math.floor(pad_below / 14) :, :] = False
    if min(new) < 10:
        raise ValueError(f"the aspect ratio is very extreme {new}")
    return new, target, mask


def tokens(mask: npt.NDArray[np.bool_], crop: int) -> int:
    """Counted on the mask itself, every second patch of it."""
    side = crop // 14 // 2
    every_second = mask[::2, ::2]
    return side * side + 1 + int(every_second.sum()) + int(every_second[:, 0].sum()) + side


def processed(image: PIL.Image.Image, crop: int, most: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Crops [n, crop, crop, 3] and their masks, without the global view."""
    new, target, mask = layout(*image.size, crop, most)
    whole = PIL.Image.new("RGB", target, (255, 255, 255))
    whole.paste(image.resize(new, PIL.Image.Resampling.BILINEAR), (0, 0))
    pixels = (np.asarray(whole).astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    side = crop // 14
    crops, masks = [], []
    for y in range(target[1] // crop):
        for x in range(target[0] // crop):
            crops.append(pixels[y * crop : (y + 1) * crop, x * crop : (x + 1) * crop])
            masks.append(mask[y * side : (y + 1) * side, x * side : (x + 1) * side])
    return np.stack(crops), np.stack(masks)

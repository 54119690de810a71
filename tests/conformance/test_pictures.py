"""Pictures against the published processor's rule: tokens, crops and masks exactly, the global view to 5e-6."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media.image import Image, image_tokens, read_image
from tests.conformance import picture_reference as reference
from tests.conformance import recipe_pictures as recipe

SIDES = sorted(
    {1, 2, 9, 10, 13, 14, 27, 28, 55, 56, 57, 223, 224, 447, 448, 449, 461, 462, 463, 550, 640, 686, 895, 896, 897, 960,
     1000, 1080, 1320, 1344, 1345, 1920, 2048, 2688, 2689, 3000, 3024, 4000, 4032, 4097, 5000, 8064, 12_000, 16_128,
     16_129, 20_000, 65_535, *range(100, 5000, 97)}
)  # fmt: skip


@pytest.mark.parametrize(("crop", "most"), [(448, 36), (448, 1), (448, 12), (56, 36), (112, 4), (56, 1), (28, 7)])
def test_tokens_of_every_size(crop: int, most: int) -> None:
    """9,604 sizes with the published grid; fewer with others."""
    sides = SIDES if (crop, most) == (448, 36) else SIDES[::7]
    for width in sides:
        for height in sides:
            try:
                _, _, mask = reference.layout(width, height, crop, most)
            except ValueError:
                with pytest.raises(RequestError, match="too narrow"):
                    image_tokens(width, height, crop_size=crop, max_crops=most)
                continue
            expected = reference.tokens(mask, crop)
            assert image_tokens(width, height, crop_size=crop, max_crops=most) == expected, (width, height)


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [(448, 448, 545), (960, 686, 1745), (449, 449, 1329), (1320, 550, 1253)],
)
def test_tokens_of_known_sizes(width: int, height: int, tokens: int) -> None:
    assert image_tokens(width, height) == tokens


@pytest.mark.parametrize(("width", "height", "crop", "most"), [
    (960, 686, 448, 36), (1320, 550, 448, 36), (30, 20, 448, 36), (700, 3000, 448, 36), (50, 40, 56, 36),
    (100, 130, 56, 4), (300, 17, 56, 36), (1000, 1000, 112, 9),
])  # fmt: skip
def test_crops_and_masks_are_equal(width: int, height: int, crop: int, most: int) -> None:
    rng = np.random.default_rng(width)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    expected, masks = reference.processed(picture, crop, most)
    image = read_image(picture, crop_size=crop, max_crops=most)
    assert np.array_equal(image.pixels[1:], expected) and image.pixels.dtype == np.float32
    assert np.array_equal(image.mask[1:], masks) and image.mask[0].all()
    assert image.tokens == image_tokens(width, height, crop_size=crop, max_crops=most)


@pytest.mark.parametrize(
    ("crop", "grid"), [(crop, grid) for crop, grids in recipe.CASES.items() for grid in grids], ids=str
)
def test_the_global_view_is_torch_s(crop: int, grid: tuple[int, int]) -> None:
    padded = recipe.padded(crop, grid)
    view = Image(padded, padded.shape[:2], crop).pixels[0]
    with np.load(Path(__file__).with_name("golden_pictures.npz")) as golden:
        expected = golden[recipe.name(crop, grid)]
    assert np.abs(recipe.stored(view) - expected).max() < 5e-6

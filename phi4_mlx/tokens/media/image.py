"""Pictures as a multimodal model reads them: a grid of square crops, a global view, and a price in tokens.

Source: the image processor published with Phi-4-multimodal-instruct (`dynamic_preprocess` and its caller).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union

from phi4_mlx.errors import RequestError, check_whole
from phi4_mlx.tokens.media.bicubic import resize_bicubic
from phi4_mlx.tokens.media.picture_file import Picture, open_picture

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import PIL.Image

ImageSource = Union[str, bytes, "os.PathLike[str]", "PIL.Image.Image", "npt.NDArray[Any]", "Image"]

CROP_SIZE = 448  # pixels of a crop's side in the published model
MAX_CROPS = 36  # `dynamic_hd` of the published preprocessor_config.json
PATCH_SIZE = 14  # pixels of a patch's side
_POOLED = 2  # patches of a side that the pooling makes one
_LEAST_SIDE = 10  # pixels; the reference refuses a picture that has fewer after the resize
MOST_CROPS = 256  # far above any published model's limit; bounds the search for a grid
_WHITE = 255


@dataclass(frozen=True, eq=False)
class Image:
    """A picture, resized to a grid of crops.

    Attributes:
        padded: uint8 [H_t, W_t, 3], the resized picture, white to the right and below.
        content: (height, width) in pixels of the resized picture inside.
        crop_size: side of a crop in pixels.
        patch_size: side of a patch in pixels.
    """

    padded: npt.NDArray[np.uint8]
    content: tuple[int, int]
    crop_size: int = CROP_SIZE
    patch_size: int = PATCH_SIZE

    kind: ClassVar[Literal["image"]] = "image"

    def __post_init__(self) -> None:
        self.padded.setflags(write=False)  # the digest names these bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return Image, (self.padded, self.content, self.crop_size, self.patch_size)

    def __repr__(self) -> str:
        return f"<image of {self.content[1]} x {self.content[0]} pixels, {self.tokens} tokens>"

    @property
    def size(self) -> tuple[int, int]:
        """(H_t, W_t): height and width in pixels of the grid of crops."""
        return self.padded.shape[0], self.padded.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of the picture in a prompt."""
        return _tokens(self.size, self.content, self.crop_size, self.patch_size)

    @property
    def pixels(self) -> npt.NDArray[np.float32]:
        """float32 [n, crop, crop, 3] from -1 to 1: the global view, then the crops row by row.

        The global view is bicubic and may leave that range by a fifth.
        """
        import numpy as np

        crop, rows, columns = self.crop_size, self.size[0] // self.crop_size, self.size[1] // self.crop_size
        pixels = np.empty((1 + rows * columns, crop, crop, 3), np.float32)
        pixels[0] = resize_bicubic(self.padded, crop)
        for index in range(rows * columns):
            y, x = (crop * part for part in divmod(index, columns))
            pixels[1 + index] = self.padded[y : y + crop, x : x + crop]
        for step, number in ((np.divide, 255), (np.subtract, 0.5), (np.divide, 0.5)):  # rounded as the reference rounds
            step(pixels, np.float32(number), out=pixels)
        return pixels

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """bool [n, crop / patch, crop / patch]: patches of the picture; False in the white ones around it."""
        import numpy as np

        side = self.crop_size // self.patch_size
        rows, columns = self.size[0] // self.crop_size, self.size[1] // self.crop_size
        valid = np.zeros((rows * side, columns * side), bool)
        valid[tuple(slice(n) for n in _valid_patches(self.size, self.content, self.patch_size))] = True
        crops = valid.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)
        return np.concatenate((np.ones((1, side, side), bool), crops))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of all that the model sees: equal for equal pictures, in any process."""
        from hashlib import sha256

        header = f"image {self.size} {self.content} {self.crop_size} {self.patch_size} "
        return sha256(header.encode() + self.padded.tobytes()).hexdigest()


def read_image(source: ImageSource, *, crop_size: int = CROP_SIZE, max_crops: int = MAX_CROPS) -> Image:
    """Reads a picture and resizes it as the published image processor does.

    The rotation that a camera noted (EXIF) is applied; transparency is dropped, not blended.

    Args:
        source: the path of a picture file, its bytes, a PIL image, an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]
            (integers to 255, uint16 to 65,535, or floats from 0 to 1), or an `Image`, which is returned as it is.
        crop_size: side of a crop in pixels, a multiple of 28; the model's config names it.
        max_crops: the most crops; fewer cost fewer tokens and show less detail.

    Returns:
        The picture.

    Raises:
        RequestError: the source is not a picture, is damaged, too large or too narrow.
    """
    if isinstance(source, Image):
        if source.crop_size != crop_size:
            raise RequestError(
                f"this image was read with crop_size {source.crop_size}; the model needs {crop_size}: read it again"
            )
        return source
    _check_grid(crop_size, max_crops)
    picture = open_picture(source)
    target, content = _layout(*picture.size, crop_size, max_crops)
    return Image(_padded(picture, target, content), content, crop_size)


def image_tokens(width: int, height: int, *, crop_size: int = CROP_SIZE, max_crops: int = MAX_CROPS) -> int:
    """Tokens of a picture in a prompt, from its size alone.

    Args:
        width: in pixels, after the rotation that a camera noted.
        height: in pixels.
        crop_size: as for `read_image`.
        max_crops: as for `read_image`.

    Raises:
        RequestError: a size is not positive, or the picture is too narrow.
    """
    check_whole("width", width, 1)
    check_whole("height", height, 1)
    _check_grid(crop_size, max_crops)
    target, content = _layout(width, height, crop_size, max_crops)
    return _tokens(target, content, crop_size, PATCH_SIZE)


def _check_grid(crop_size: int, max_crops: int) -> None:
    check_whole("crop_size", crop_size, _POOLED * PATCH_SIZE, 2**12)
    check_whole("max_crops", max_crops, 1, MOST_CROPS)
    if crop_size % (_POOLED * PATCH_SIZE):
        raise RequestError(f"crop_size must be a multiple of {_POOLED * PATCH_SIZE}, not {crop_size}")


def _layout(width: int, height: int, crop: int, max_crops: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the grid, and of the picture in it."""
    columns, rows = -(-width // crop), -(-height // crop)
    if columns * rows > max_crops:
        columns, rows = _nearest_grid(width, height, crop, max_crops)
    target = crop * rows, crop * columns
    by_width, by_height = target[1] / width, target[0] / height  # rounded as the reference rounds: floats, then int()
    narrower = by_width < by_height
    content = (int(height * by_width), target[1]) if narrower else (target[0], int(width * by_height))
    if min(content) < _LEAST_SIDE:
        raise RequestError(
            f"a picture of {width} x {height} pixels is too narrow: {content[1]} x {content[0]} would be left of it, "
            f"and each side needs {_LEAST_SIDE} pixels; crop it"
        )
    return target, content


def _nearest_grid(width: int, height: int, crop: int, max_crops: int) -> tuple[int, int]:
    """The (columns, rows) nearest in shape; among those of one shape the largest that the picture half fills."""
    grids = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)]
    best, least = (1, 1), float("inf")
    for i, j in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - i / j)
        if difference < least or (difference == least and width * height > 0.5 * crop * crop * i * j):
            best, least = (i, j), difference
    return best


def _padded(picture: Picture, target: tuple[int, int], content: tuple[int, int]) -> npt.NDArray[np.uint8]:
    import numpy as np

    padded = np.full((*target, 3), _WHITE, np.uint8)
    padded[: content[0], : content[1]] = picture.resized(content[1], content[0])
    return padded


def _valid_patches(size: tuple[int, int], content: tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of patches that hold some of the picture."""
    height, width = (whole // patch - (whole - inside) // patch for whole, inside in zip(size, content, strict=True))
    return height, width


def _tokens(size: tuple[int, int], content: tuple[int, int], crop: int, patch: int) -> int:
    """Pooled patches of the crops and of the global view, an end for each row of them, and one token between."""
    rows, columns = (-(-valid // _POOLED) for valid in _valid_patches(size, content, patch))
    side = crop // patch // _POOLED
    return rows * (columns + 1) + 1 + side * (side + 1)

"""Picture files, PIL images and arrays, decoded to upright RGB pixels."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, Union, cast

from phi4_mlx.errors import RequestError, message_of
from phi4_mlx.files.regular_file import open_regular
from phi4_mlx.terminal.suggestion import path_suggestion
from phi4_mlx.tokens.media.heic import heic_as_png
from phi4_mlx.tokens.media.picture_header import (
    MOST_BYTES,
    TOO_LARGE,
    MeteredFile,
    UnreadablePicture,
    check_header,
    check_size,
    picture_format,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import PIL.Image

PictureSource = Union[str, bytes, "os.PathLike[str]", "PIL.Image.Image", "npt.NDArray[Any]"]

_PLUGINS = {"JPEG": "Jpeg", "PNG": "Png", "GIF": "Gif", "WebP": "WebP", "AVIF": "Avif", "BMP": "Bmp", "TIFF": "Tiff",
            "PPM": "Ppm", "ICO": "Ico"}  # fmt: skip
_ORIENTATION = 0x0112  # the EXIF tag
_STRIP_PIXELS = 2**20  # converted and resized at once

# One at a time: a decoder may take all the memory that the limits allow, and Python's warnings are one global list.
_DECODER = Lock()


class Picture:
    """A decoded picture.

    Attributes:
        size: (width, height) in pixels, upright.
    """

    def __init__(self, image: PIL.Image.Image, name: str):
        """Takes a loaded image.

        Args:
            image: as it is stored, before the rotation that a camera noted.
            name: what messages call it.
        """
        self._image, self._name, self._turn = image, name, _orientation(image)
        self.size = upright_size(image)

    def resized(self, width: int, height: int) -> npt.NDArray[np.uint8]:
        """RGB pixels [height, width, 3] of PIL's bilinear resize.

        Raises:
            RequestError: values of 32 bits are out of the range that can be read.
        """
        import numpy as np
        import PIL.Image

        across, down = self.size
        step = max(_STRIP_PIXELS // across, 1)
        pixels = np.empty((height, width, 3), np.uint8)
        # One colour at a time, filled in strips: a whole copy for the rotation or for RGB could be 200 MB.
        for channel in range(3):
            plane = PIL.Image.new("L", self.size)
            for top in range(0, down, step):
                with _refused(self._name):
                    rows = self._rows(top, min(top + step, down))
                plane.paste(rows.getchannel(channel), (0, top))
            pixels[..., channel] = np.asarray(plane.resize((width, height), PIL.Image.Resampling.BILINEAR))
        return pixels

    def _rows(self, top: int, bottom: int) -> PIL.Image.Image:
        """Upright rows in RGB."""
        from PIL.Image import Transpose

        width, height = self._image.size
        if self._turn in (3, 4, 7, 8):  # the first upright row is the last row or column
            end = width if self._turn in (7, 8) else height
            top, bottom = end - bottom, end - top
        box = (top, 0, bottom, height) if self._turn >= 5 else (0, top, width, bottom)
        turns = [Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
                 Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90]  # fmt: skip
        rows = self._image.crop(box)
        rows.info.pop("transparency", None)  # of a palette or one colour; dropped like all alpha
        return _rgb(rows if self._turn == 1 else rows.transpose(turns[self._turn - 2]))


def open_picture(source: PictureSource) -> Picture:
    """Decodes a picture.

    Args:
        source: the path of a file, its bytes, a PIL image, or an array as for `read_image`.

    Returns:
        The picture: the first one of an animation or of several pages.

    Raises:
        RequestError: the source cannot be read; names it and the reason.
    """
    name = _name(source)
    with _refused(name):
        if isinstance(source, (str, bytes, os.PathLike)):
            with _opened(source) as image, _DECODER, _quiet():
                image.load()
                return Picture(image, name)
        image = _given(source)
        check_size(*image.size)
        image.load()
        return Picture(image, name)


def picture_size(source: PictureSource) -> tuple[int, int]:
    """(width, height) in pixels, upright, from a file's header alone: the price of a picture before it is read.

    Args:
        source: as for `open_picture`.

    Raises:
        RequestError: as for `open_picture`, but damage behind the header is not seen.
    """
    with _refused(_name(source)):
        if not isinstance(source, (str, bytes, os.PathLike)):
            return upright_size(_given(source))
        with _opened(source) as image:
            return upright_size(image)


def upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    """(width, height) of an image after the rotation that a camera noted."""
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _name(source: Any) -> str:
    return f"{source!s:.300}" if isinstance(source, (str, os.PathLike)) else "the picture"


@contextlib.contextmanager
def _refused(name: str) -> Iterator[None]:
    """Turns what decoders raise into one line."""
    try:
        yield
    except RequestError:
        raise
    except UnreadablePicture as error:
        raise RequestError(f"{name} cannot be read: {error}") from None
    except Exception as error:  # of any kind: decoders raise what they run into
        if type(error).__name__ == "DecompressionBombError":  # by Pillow, which sees the size first
            raise RequestError(f"{name} cannot be read: {TOO_LARGE}") from None
        reason = "" if type(error).__name__ == "UnidentifiedImageError" else f" ({message_of(error):.200})"
        raise RequestError(f"{name} cannot be read: it is damaged or cut off{reason}") from None


@contextlib.contextmanager
def _opened(source: str | bytes | os.PathLike[str]) -> Iterator[PIL.Image.Image]:
    """A picture file whose header is checked and whose pixels are not read yet."""
    import PIL.Image

    with io.BytesIO(source) if isinstance(source, bytes) else _open_file(Path(source)) as file:
        metered = MeteredFile(file)
        kind = picture_format(metered)
        if kind == "HEIC":
            with _opened(heic_as_png(metered)) as image:
                yield image
            return
        check_header(metered, kind)
        import_module(f"PIL.{_PLUGINS[kind]}ImagePlugin")  # or PIL imports all of them
        with _DECODER, _quiet():
            image = PIL.Image.open(cast(BinaryIO, metered), formats=[kind.upper()])
            check_size(*image.size, _memory_kind(image, kind), metered.size if kind in ("WebP", "AVIF") else 0)
        yield image


def _memory_kind(image: PIL.Image.Image, kind: str) -> str:
    return "progressive JPEG" if kind == "JPEG" and image.info.get("progressive") else kind


def _open_file(path: Path) -> BinaryIO:
    if not path.name:
        raise UnreadablePicture("it is a folder, not a file")
    try:
        file = open_regular(path, opened=True)
    except FileNotFoundError:
        near = path_suggestion(str(path), os.path.isfile)
        raise UnreadablePicture(f"there is no such file{near}") from None
    except OSError as error:
        raise UnreadablePicture(f"{error.strerror}") from None
    if file.seekable():
        return file
    with file:
        return io.BytesIO(file.read(MOST_BYTES + 1))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings about odd metadata and sizes; sizes are checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation, from 1 to 8; 1 if there is none or it cannot be read."""
    import PIL.Image

    if image.format == "TIFF":  # Pillow turns it as it loads
        return 1
    try:
        # The base class's: a PNG's own decodes the pixels first.
        value = PIL.Image.Image.getexif(image).get(_ORIENTATION)
    except Exception:  # of any kind, as metadata can hold anything
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _given(source: Any) -> PIL.Image.Image:
    """A PIL image, or one made of an array."""
    import numpy as np
    import PIL.Image

    if isinstance(source, PIL.Image.Image):
        return source
    if not hasattr(source, "__array__"):
        raise UnreadablePicture(f"it is a {type(source).__name__}, not a path, bytes, a PIL image or an array")
    array = np.asarray(source)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise UnreadablePicture(f"it is an array {list(array.shape)}; it needs [height, width] and 1, 3 or 4 channels")
    check_size(array.shape[1], array.shape[0])
    return PIL.Image.fromarray(np.ascontiguousarray(_bytes_of(array[..., :3] if array.ndim == 3 else array)))


def _bytes_of(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Brightness of 8 bits: integers to 255, or to 65,535 in uint16; floats from 0 to 1, rounded."""
    import numpy as np

    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "biuf":
        raise UnreadablePicture(f"its values are {array.dtype}; they must be integers, or floats from 0 to 1")
    low, high = array.min(), array.max()
    if array.dtype.kind == "f":
        if not 0 <= low <= high <= 1:  # false for NaN too
            raise UnreadablePicture(f"its values are from {low:g} to {high:g}; floats must be from 0 to 1")
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    if array.dtype.itemsize == 2 and array.dtype.kind == "u":
        return _upper_bits(array)
    if low < 0 or high > 255:
        raise UnreadablePicture(
            f"its values are from {low} to {high}; {array.dtype} must be from 0 to 255, and uint16 holds brightness of "
            "16 bits"
        )
    return array.astype(np.uint8)


def _upper_bits(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Brightness of 16 bits in 8, as Pillow takes it from colours."""
    import numpy as np

    return (array >> 8).astype(np.uint8)


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image in RGB: alpha dropped, 16 bits scaled."""
    import numpy as np
    import PIL.Image

    if image.mode.startswith(("I", "F")):  # convert() would clip them to 255
        array = np.asarray(image)
        low, high = array.min(), array.max()
        if image.mode == "I" and not 0 <= low <= high < 2**16:
            raise UnreadablePicture(f"its values are from {low} to {high}; whole numbers of 16 bits are read")
        image = PIL.Image.fromarray(_bytes_of(array) if image.mode == "F" else _upper_bits(array))
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    return image.convert("RGB")

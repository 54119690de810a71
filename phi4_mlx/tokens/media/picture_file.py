"""Picture files: opened, checked and decoded to rows of RGB pixels."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import PIL.Image


class Picture:
    """A decoded picture, upright."""

    def __init__(self, image: PIL.Image.Image):
        self._image = image.convert("RGB")
        self.size = self._image.size

    def resized(self, width: int, height: int) -> npt.NDArray[np.uint8]:
        import numpy as np
        from PIL.Image import Resampling

        return np.asarray(self._image.resize((width, height), Resampling.BILINEAR))


def open_picture(source: Any) -> Picture:
    import PIL.Image
    import PIL.ImageOps

    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        source = Path(source)
    if isinstance(source, (io.BytesIO, Path)):
        try:
            source = PIL.Image.open(source)
            source.load()
        except Exception as error:
            raise RequestError(f"this is not a picture that can be read: {error}") from None
    if not isinstance(source, PIL.Image.Image):
        source = PIL.Image.fromarray(source)
    return Picture(PIL.ImageOps.exif_transpose(source))

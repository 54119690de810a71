"""HEIC pictures of iPhones, converted by the program that macOS has for them."""

from __future__ import annotations

import platform
import subprocess
import tempfile
from pathlib import Path

from phi4_mlx.tokens.media.picture_header import MeteredFile, UnreadablePicture

_TIMEOUT_S = 60


def heic_as_png(file: MeteredFile) -> bytes:
    """Converts a HEIC picture to PNG.

    Args:
        file: the picture.

    Raises:
        UnreadablePicture: this is not macOS, or its `sips` does not read the picture.
    """
    if platform.system() != "Darwin":
        raise UnreadablePicture(
            "it is a HEIC picture, which only macOS reads: convert it first, with `heif-convert PICTURE.heic "
            "PICTURE.png` (package libheif-examples) or on the phone"
        )
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "given.heic"), Path(folder, "made.png")
        file.seek(0)
        given.write_bytes(file.read())
        command = ["sips", "--setProperty", "format", "png", str(given), "--out", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnreadablePicture(f"sips does not convert this HEIC picture: {error}") from None
        if done.returncode or not made.is_file():
            raise UnreadablePicture(f"sips does not convert this HEIC picture: {done.stderr.strip():.200}")
        return made.read_bytes()

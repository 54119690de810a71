"""Picture files: what is read, as what, and what is refused in one line."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
from PIL import ImageOps

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media import picture_file
from phi4_mlx.tokens.media.image import read_image
from phi4_mlx.tokens.media.picture_file import open_picture, picture_size
from phi4_mlx.tokens.media.picture_header import UnreadablePicture, check_size
from tests.unit.tokens.media.odd_pictures import HALVES, REFUSED, TAKEN, exif, halves, noise, saved, sixteen_bits


@pytest.mark.parametrize("name", HALVES)
def test_a_picture_is_seen_as_it_is(name: str) -> None:
    picture = open_picture(HALVES[name]())
    width, height = picture.size
    pixels = picture.resized(width, height).astype(int)
    seen = pixels[height // 2, width // 8], pixels[height // 2, -width // 8]
    assert np.abs(np.subtract(seen, ((255, 0, 0), (0, 0, 255)))).max() <= 12, seen


@pytest.mark.parametrize("name", TAKEN)
def test_an_odd_picture_is_read(name: str) -> None:
    picture = open_picture(TAKEN[name]())
    assert picture.resized(*picture.size).shape == (*picture.size[::-1], 3)


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_picture_is_refused_in_one_line(name: str) -> None:
    made, words = REFUSED[name]
    with pytest.raises(RequestError, match=words) as refusal:
        read_image(made())
    assert str(refusal.value).startswith("the picture ") and len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_rotation_of_a_camera_is_applied(kind: str, orientation: int) -> None:
    data = exif(orientation, kind=kind)
    upright = ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB")
    picture = open_picture(data)
    assert picture.size == picture_size(data) == upright.size
    assert np.array_equal(picture.resized(*upright.size), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(150, 110), (3, 400), (400, 3)])
def test_strips_are_resized_as_the_whole(
    monkeypatch: pytest.MonkeyPatch, orientation: int, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(picture_file, "_STRIP_PIXELS", 700)
    image = noise(size)
    image.getexif()[0x0112] = orientation
    whole = ImageOps.exif_transpose(image)
    for width, height in ((448, 307), (10, 134), whole.size):
        expected = whole.resize((width, height), PIL.Image.Resampling.BILINEAR)
        assert np.array_equal(open_picture(image).resized(width, height), expected)


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "La", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "I;16B"],
)
def test_an_image_of_any_mode_is_read(mode: str) -> None:
    grey = {"I": 128 * 256, "F": 0.5, "I;16": 128 * 256, "I;16B": 128 * 256, "L": 128, "1": 1, "P": 0}
    image = PIL.Image.new(mode, (20, 10), grey.get(mode, 0))
    pixels = open_picture(image).resized(20, 10)
    assert pixels.shape == (10, 20, 3) and (pixels == pixels[0, 0]).all()
    if mode in ("I", "F", "I;16", "I;16B", "L"):
        assert pixels[0, 0, 0] == 128
    assert image.mode == mode


def test_alpha_is_dropped_and_not_blended() -> None:
    array = np.zeros((4, 4, 4), np.uint8)
    array[..., 0] = 200
    for source in (array, PIL.Image.fromarray(array), saved(PIL.Image.fromarray(array), "PNG")):
        assert (open_picture(source).resized(4, 4) == (200, 0, 0)).all()


@pytest.mark.parametrize("kind", ["file", "array", "image", "other byte order"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (64, 1))
    source = {"file": sixteen_bits(), "array": ramp, "image": PIL.Image.fromarray(ramp),
              "other byte order": ramp.astype(">u2")}[kind]  # fmt: skip
    seen = open_picture(source).resized(256, 64)
    assert np.abs(seen[0, :, 0].astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize(
    ("array", "value"),
    [
        (np.full((4, 5), 7, np.uint8), 7),
        (np.full((4, 5, 1), 7, np.uint8), 7),
        (np.full((4, 5, 3), 7, np.uint8), 7),
        (np.full((4, 5, 4), 7, np.uint8), 7),
        (np.full((4, 5, 3), 7 * 257, np.uint16), 7),
        (np.full((4, 5), 200, np.uint16), 0),  # dark, as in a file
        (np.full((4, 5, 3), 7 / 255, np.float32), 7),
        (np.full((4, 5), 7 / 255, np.float64), 7),
        (np.full((4, 5), 7 / 255, np.float16), 7),
        (np.full((4, 5, 3), 7, np.int64), 7),
        (np.full((4, 5, 3), 255, np.int32), 255),
        (np.full((4, 5), 7, np.int8), 7),
        (np.full((4, 5), 7 * 256, np.dtype(">u2")), 7),
        (np.full((4, 5), 200, np.uint64), 200),
        (np.ones((4, 5), bool), 255),
        (np.full((5, 4, 3), 7, np.uint8).swapaxes(0, 1)[::-1], 7),
    ],
)
def test_an_array_is_read(array: npt.NDArray[Any], value: int) -> None:
    assert (open_picture(array).resized(5, 4) == value).all() and picture_size(array) == (5, 4)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((0, 5, 3), np.uint8), "5 x 0 pixels"),
        (np.zeros((3, 40, 50), np.uint8), r"\[3, 40, 50\]"),
        (np.zeros((4, 5, 2), np.uint8), r"\[4, 5, 2\]"),
        (np.zeros(5, np.uint8), r"\[5\]"),
        (np.full((4, 5, 3), 256), "int64 must be from 0 to 255"),
        (np.full((4, 5, 3), -1), "from -1 to -1"),
        (np.zeros((4, 5), complex), "complex128"),
        (np.array([["a"]]), "<U1"),
        (np.full((4, 5), np.nan), "nan"),
        (np.full((4, 5), 255.0), "from 0 to 1"),
        (np.full((4, 5), -0.1), "from 0 to 1"),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000)), "limit is 50,000,000"),
        (PIL.Image.new("RGB", (0, 9)), "0 x 9 pixels"),
        (PIL.Image.new("I", (9, 9), -1), "16 bits"),
        (PIL.Image.new("I", (9, 9), 70_000), "16 bits"),
        (PIL.Image.new("F", (9, 9), 255), "from 0 to 1"),
        (None, "NoneType"),
        (5, "int"),
        ([[0, 0]], "list"),
    ],
)
def test_what_is_not_a_picture_is_refused_in_one_line(source: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_image(source)


@pytest.mark.parametrize(
    ("kind", "side"), [("JPEG", 7_000), ("progressive JPEG", 5_600), ("WebP", 4_400), ("TIFF", 7_000)]
)
def test_memory_limits_the_pixels_of_a_format(kind: str, side: int) -> None:
    check_size(side, side, kind)
    with pytest.raises(UnreadablePicture):
        check_size(side + 100, side + 100, kind)


def test_a_content_decides_and_not_a_name(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(saved(halves(), "JPEG"))
    assert picture_size(path) == picture_size(str(path)) == (64, 48)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(RequestError, match=r"picture\.png cannot be read: it is PostScript"):
        read_image(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _enormous(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**29)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_folder, "a folder"),
        (os.mkfifo, "a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (_dangling, "no such file"),
        (lambda path: path.symlink_to(path), "Too many levels"),
        (lambda path: path.touch(), "empty"),
        (lambda path: None, "no such file; did you mean .*holidays.jpg"),
        (_enormous, "536,870,912 bytes"),
    ],
)
def test_a_path_without_a_file_is_refused_in_one_line(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    (tmp_path / "holidays.jpg").write_bytes(saved(halves(), "JPEG"))
    path = tmp_path / "holiday.jpg"
    make(path)
    for read in (read_image, picture_size):
        with pytest.raises(RequestError, match=words):
            read(path)


@pytest.mark.parametrize("path", ["", ".", "/", "a\0b", "x" * 5000])
def test_a_name_of_no_file_is_refused_in_one_line(path: str) -> None:
    with pytest.raises(RequestError) as refusal:
        read_image(path)
    assert len(str(refusal.value)) < 500


def test_a_pipe_of_the_shell_is_read() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        file.write(saved(halves(size=(20, 10)), "PNG"))
    try:
        assert open_picture(f"/dev/fd/{reader}").size == (20, 10)
    finally:
        os.close(reader)


def test_heic_is_converted_by_macos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    heic, _ = REFUSED["heic"]
    (tmp_path / "made.png").write_bytes(HALVES["png"]())
    program = tmp_path / "sips"
    program.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "{tmp_path}/made.png" "$last"\n')
    program.chmod(0o755)
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert open_picture(heic()).size == (64, 48)
    program.write_text("#!/bin/sh\necho no such codec >&2\nexit 13\n")
    with pytest.raises(RequestError, match="no such codec"):
        open_picture(heic())
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError, match="sips"):
        open_picture(heic())


def test_warnings_of_others_are_left_as_they_are() -> None:
    before = list(warnings.filters)
    open_picture(HALVES["jpeg with a damaged exif"]())
    assert warnings.filters == before


def test_a_size_is_read_without_the_pixels() -> None:
    """A picture cut off behind its header has a size, and no pixels."""
    data = saved(noise((640, 480)), "JPEG")[:2000]
    assert picture_size(data) == (640, 480)
    with pytest.raises(RequestError):
        open_picture(data)

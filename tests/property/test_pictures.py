"""Pictures of any size and mode: the price holds, nothing crashes, and a pickle is the same picture."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media.data_url import url_bytes
from phi4_mlx.tokens.media.image import Image, image_tokens, read_image
from tests.conftest import ROOT
from tests.unit.tokens.media.odd_pictures import HALVES, REFUSED, TAKEN

SIDES = st.integers(1, 400)
MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I;16"]
FILES = [HALVES[name]() for name in ("png", "jpeg", "progressive jpeg", "gif", "webp", "bmp", "tiff lzw", "ico", "mpo")]
FILES += [TAKEN["16-bit pgm"](), REFUSED["webp giant"][0](), REFUSED["tiff with a giant tile"][0]()]


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.sampled_from(MODES), st.integers(1, 4), st.integers(1, 12), st.integers(0, 8))
def test_a_picture_costs_what_its_size_says(
    width: int, height: int, mode: str, unit: int, most: int, orientation: int
) -> None:
    crop, image = 28 * unit, PIL.Image.new(mode, (width, height))
    image.getexif()[0x0112] = orientation
    upright = (height, width) if orientation >= 5 else (width, height)
    try:
        price = image_tokens(*upright, crop_size=crop, max_crops=most)
    except RequestError as error:
        with pytest.raises(RequestError) as refusal:
            read_image(image, crop_size=crop, max_crops=most)
        assert str(refusal.value) == str(error)
        return
    read = read_image(image, crop_size=crop, max_crops=most)
    side, crops = crop // 14, read.size[0] * read.size[1] // crop**2
    assert read.tokens == price and crops <= most
    assert read.pixels.shape == (1 + crops, crop, crop, 3) and read.mask.shape == (1 + crops, side, side)
    assert read.mask.any((1, 2)).all(), "a crop without any of the picture"
    copy = pickle.loads(pickle.dumps(read))
    assert copy.digest == read.digest and copy.tokens == price and copy.content == read.content


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FILES), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4), st.floats(0, 1))
def test_damage_anywhere_is_a_picture_or_one_line(data: bytes, changes: list[tuple[float, int]], end: float) -> None:
    damaged = bytearray(data[: int(end * len(data)) + 1] if end < 0.5 else data)
    for place, value in changes:
        damaged[int(place * (len(damaged) - 1))] = value
    try:
        assert isinstance(read_image(bytes(damaged)), Image)
    except RequestError as error:
        assert len(str(error).splitlines()) == 1


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_one_line(data: bytes) -> None:
    with pytest.raises(RequestError):
        read_image(data)


@settings(max_examples=200, deadline=None)
@given(st.text("data:imge/pnghtf;b64,AZ+= %\n\0é€", max_size=50))
def test_any_text_as_a_url_is_one_line(text: str) -> None:
    for url in (text, "data:" + text, "data:image/png;base64," + text):
        try:
            url_bytes(url)
        except RequestError as error:
            assert len(str(error).splitlines()) == 1


def test_digests_are_equal_in_any_process_and_differ_for_any_pixel() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    read = read_image(picture, crop_size=56)
    code = (
        "import sys; from phi4_mlx.tokens.media.image import read_image\n"
        "print(read_image(sys.stdin.buffer.read(), crop_size=56).digest)"
    )
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "PNG")
    done = subprocess.run(
        [sys.executable, "-c", code], input=file.getvalue(), capture_output=True, cwd=ROOT, timeout=60
    )
    assert done.stdout.decode().strip() == read.digest, done.stderr.decode()
    changed = picture.copy()
    changed[20, 30, 1] ^= 128
    digests = {read.digest, read_image(changed, crop_size=56).digest, read_image(picture, crop_size=112).digest}
    other = Image(read.padded, (read.content[0] - 1, read.content[1]), 56)
    assert len({*digests, other.digest}) == 4


def test_a_pickle_holds_the_bytes_alone() -> None:
    read = read_image(np.zeros((300, 500, 3), np.uint8))
    assert read.pixels.nbytes > 4 * read.padded.nbytes
    assert read.digest and len(pickle.dumps(read)) < read.padded.nbytes + 1000

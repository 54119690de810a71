"""Picture files: what is read, as what, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media.image import read_image
from phi4_mlx.tokens.media.picture_file import open_picture, picture_size
from tests.unit.tokens.media.odd_pictures import HALVES, REFUSED, TAKEN, Made


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



"""Pages of PDFs as pictures: which ones, what is seen on them, and hostile files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.tokens.media import pdf
from phi4_mlx.tokens.media.image import read_image
from phi4_mlx.tokens.media.pdf import pdf_page, pdf_pages

pytest.importorskip("pypdfium2")


def document(pages: list[bytes], size: tuple[float, float] = (144, 72), trailer: bytes = b"") -> bytes:
    """A PDF whose pages have these contents."""
    kids = b" ".join(b"%d 0 R" % (3 + 2 * i) for i in range(len(pages)))
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(pages), kids)]
    for index, content in enumerate(pages):
        box = b"[0 0 %g %g]" % size
        objects.append(b"<< /Type /Page /Parent 2 0 R /MediaBox %s /Contents %d 0 R >>" % (box, 4 + 2 * index))
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
    data, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, len(data))
    return data + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + end


COLOURS = [b"1 0 0 rg", b"0 1 0 rg", b"0 0 1 rg"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "three.pdf"
    path.write_bytes(document([colour + b" 0 0 72 72 re f" for colour in COLOURS]))
    return path


def test_a_page_is_drawn_on_white(file: Path) -> None:
    image = pdf_page(file, 2)
    assert image.size == (300, 150)
    seen = np.asarray(image)[75, [75, 225]].tolist()
    assert seen == [[0, 255, 0], [255, 255, 255]]
    assert read_image(image).size == (448, 448)


def test_a_large_page_has_at_most_the_pixels_that_the_model_sees(tmp_path: Path) -> None:
    path = tmp_path / "poster.pdf"
    path.write_bytes(document([b""], (14_400, 14_400)))
    width, height = pdf_page(path, 1).size
    assert width == height and abs(width * height / (36 * 448**2) - 1) < 0.01


@pytest.mark.parametrize(
    ("pages", "numbers"),
    [("", [1, 2, 3]), ("2", [2]), ("2-3", [2, 3]), (" 3 , 1-2 ", [3, 1, 2]), ("2-", [2, 3]), ("-2", [1, 2]),
     ("1,1-2,2", [1, 2])],
)  # fmt: skip
def test_pages_are_chosen(file: Path, pages: str, numbers: list[int]) -> None:
    assert pdf_pages(file, pages) == numbers


@pytest.mark.parametrize(
    ("pages", "words"),
    [("4", "1 to 3"), ("0", "1 to 3"), ("3-2", "1 to 3"), ("1-99", "1 to 3"), ("a", "neither"),
     ("1 2", "neither"), ("-", "neither"), ("1,,2", "neither"), ("1--2", "neither"), ("9" * 5000, "neither"),
     ("²", "neither")],
)  # fmt: skip
def test_pages_that_do_not_exist_are_refused_in_one_line(file: Path, pages: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        pdf_pages(file, pages)


def test_too_many_pages_are_refused_before_one_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "long.pdf"
    path.write_bytes(document([b""] * 65))
    with pytest.raises(RequestError, match="65 pictures, and a prompt has at most 64: choose pages"):
        pdf_pages(path)
    assert len(pdf_pages(path, "2-65")) == 64


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a PDF"),
        (b"\x89PNG\r\n\x1a\n", "not a PDF"),
        (b"%PDF-1.7\n", "damaged"),
        (document([b""])[:200], "damaged"),
        (document([]), "no pages|damaged"),
        (document([b""], trailer=b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >> /ID [<00> <00>]"
                  % (b"00" * 32, b"00" * 32)), "encrypted"),
    ],
    ids=["empty", "png", "header", "cut", "no pages", "encrypted"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "odd.pdf"
    path.write_bytes(data)
    with pytest.raises(RequestError, match=words) as refusal:
        pdf_pages(path)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: None])
def test_a_path_without_a_file_is_refused(tmp_path: Path, make: object) -> None:
    path = tmp_path / "odd.pdf"
    make(path)  # type: ignore[operator]
    for read in (pdf_pages, lambda path: pdf_page(path, 1)):
        with pytest.raises(RequestError, match="cannot be read"):
            read(path)


@pytest.mark.parametrize("page", [0, -1, 4, 10**12, True, "1"])
def test_a_page_that_does_not_exist_is_refused(file: Path, page: int) -> None:
    with pytest.raises(RequestError, match="page"):
        pdf_page(file, page)


def test_a_page_that_takes_too_long_is_given_up(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "_TIMEOUT_S", 0.001)
    with pytest.raises(RequestError, match="took more than"):
        pdf_page(file, 1)


def test_without_the_extra_one_line_says_how_to_install_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(RequestError, match=r"pip install 'pypdfium2>=4.30'"):
        pdf_pages(file)

"""Pages of PDF files as pictures, drawn by pypdfium2 in a process of their own.

A hostile PDF can crash its reader, or keep it busy for ever. Here it costs one page: the process has limits of time and
memory.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import RequestError, check_whole
from phi4_mlx.files.regular_file import open_regular
from phi4_mlx.terminal.suggestion import path_suggestion
from phi4_mlx.tokens.messages import MAX_IMAGES

if TYPE_CHECKING:
    import PIL.Image

_MOST_BYTES = 2**28
_TIMEOUT_S = 30
_RANGE = re.compile(r"\s*(\d{1,7})?\s*(-)?\s*(\d{1,7})?\s*")


def pdf_pages(path: str | os.PathLike[str], pages: str = "") -> list[int]:
    """The numbers of the pages of a PDF that are asked for.

    Args:
        path: the file.
        pages: numbers from 1 and ranges, as in "1, 3-5" or "7-"; all pages by default.

    Returns:
        The numbers in the order of `pages`, each once; at most 64.

    Raises:
        RequestError: the file cannot be read, is encrypted or damaged, does not have these pages, or has too many;
            or pypdfium2 is not installed.
    """
    count = int(_drawn(path)[0]["pages"])
    numbers = list(dict.fromkeys(_numbers(pages, count))) if pages.strip() else list(range(1, count + 1))
    if len(numbers) > MAX_IMAGES:
        raise RequestError(
            f"{path} would be {len(numbers):,} pictures, and a prompt has at most {MAX_IMAGES}: choose pages, as in 2-5"
        )
    return numbers


def pdf_page(path: str | os.PathLike[str], page: int) -> PIL.Image.Image:
    """Draws a page of a PDF, at 150 dots an inch if it is not larger than the model sees.

    Args:
        path: the file.
        page: its number, from 1.

    Returns:
        The page in RGB.

    Raises:
        RequestError: as for `pdf_pages`, or drawing the page takes too long.
    """
    import PIL.Image

    check_whole("page", page, 1)
    head, pixels = _drawn(path, page)
    return PIL.Image.frombytes("RGB", (head["width"], head["height"]), pixels)


def _numbers(pages: str, count: int) -> list[int]:
    """The numbers that a text like "1, 3-5" stands for."""
    found: list[int] = []
    for part in pages.split(","):
        match = _RANGE.fullmatch(part)
        if not match or not (match[1] or match[3]) or bool(match[3]) > bool(match[2]):
            raise RequestError(f"pages must be numbers and ranges like 1, 3-5; {part!r:.100} is neither")
        first = int(match[1] or 1)
        last = int(match[3] or count) if match[2] else first
        if not 1 <= first <= last <= count:
            raise RequestError(f"{part.strip()!r:.100} is not in the PDF, whose pages are 1 to {count}")
        found += range(first, last + 1)
    return found


def _drawn(path: str | os.PathLike[str], page: int = 0) -> tuple[dict[str, Any], bytes]:
    """The worker's answer: an object with the number of pages and the size, and the pixels of the page."""
    if find_spec("pypdfium2") is None:
        raise RequestError(
            f"{path} is a PDF, and pypdfium2 is not installed to draw its pages: "
            f"{sys.executable} -m pip install 'pypdfium2>=4.30'"
        )
    try:
        with open_regular(Path(path)) as file:
            if (size := os.fstat(file.fileno()).st_size) > _MOST_BYTES:
                raise RequestError(f"{path} has {size:,} bytes; the limit of a PDF is {_MOST_BYTES:,}")
            # The package's own folder comes first, as for any process of this package.
            found = os.pathsep.join(dict.fromkeys(filter(None, sys.path)))
            done = subprocess.run(
                [sys.executable, "-m", "phi4_mlx.tokens.media.pdf_worker", str(page)],
                stdin=file,
                capture_output=True,
                timeout=_TIMEOUT_S,
                cwd=Path(__file__).parents[3],
                env={**os.environ, "PYTHONPATH": found},
            )
    except subprocess.TimeoutExpired:
        raise RequestError(f"{path} cannot be read: page {page} took more than {_TIMEOUT_S} seconds") from None
    except OSError as error:
        near = path_suggestion(str(path), os.path.isfile) if isinstance(error, FileNotFoundError) else ""
        raise RequestError(f"{path!s:.300} cannot be read: {error.strerror}{near}") from None
    line, _, pixels = done.stdout.partition(b"\n")
    if not line:
        raise RequestError(f"{path} cannot be read: its reader crashed, or ran out of time or memory, on it")
    head: dict[str, Any] = json.loads(line)
    if "error" in head:
        raise RequestError(f"{path} cannot be read: {head['error']}")
    return head, pixels

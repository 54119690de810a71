"""The files of the chat page, each read and compressed once, and the headers that keep the page to itself."""

from __future__ import annotations

import functools
import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from phi4_mlx.files.regular_file import read_regular

FOLDER = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "media-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify typesetter"
)
SMALL = 500  # bytes; a smaller file is not compressed


@dataclass(frozen=True)
class PageFile:
    """One file of the page.

    Attributes:
        data: its bytes.
        zipped: the same compressed by gzip; None if that saves nothing.
        kind: its content type.
        etag: names its content; a browser that has it is told so without the content.
    """

    data: bytes
    zipped: bytes | None
    kind: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> PageFile:
        """Reads and compresses a file."""
        data = read_regular(path)
        zipped = gzip.compress(data, 9, mtime=0) if len(data) >= SMALL else None
        return cls(data, zipped, TYPES[path.suffix], f'W/"{hashlib.sha256(data).hexdigest()[:24]}"')

    def answer(self, request: Request) -> Response:
        """The response to a request: the content, or "not modified"."""
        headers = {
            "content-security-policy": POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cache-control": "no-cache",  # a browser keeps it, and asks each time whether it is the newest
            "vary": "accept-encoding",
            "etag": self.etag,
        }
        known = [each.strip() for each in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        if self.zipped is None or not _accepts_gzip(request.headers.get("accept-encoding", "")):
            return Response(self.data, headers=headers, media_type=self.kind)
        return Response(self.zipped, headers=headers | {"content-encoding": "gzip"}, media_type=self.kind)


@functools.cache
def page_names() -> frozenset[str]:
    """The paths of the files below the page's folder; nothing else is ever served."""
    paths = (path for path in FOLDER.rglob("*") if path.suffix in TYPES)
    return frozenset(path.relative_to(FOLDER).as_posix() for path in paths)


def page_file(name: str) -> PageFile | None:
    """A file of the page by its path below the page's folder; None if there is none."""
    return _read(name) if name in page_names() else None


@functools.cache
def _read(name: str) -> PageFile:
    return PageFile.read(FOLDER / name)


def _accepts_gzip(header: str) -> bool:
    """True if an Accept-Encoding header allows gzip; a weight of 0 forbids it."""
    weights = {}
    for part in header.lower().split(","):
        name, _, weight = part.replace(" ", "").partition(";q=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = 0.0
    return weights.get("gzip", weights.get("*", 0.0)) > 0

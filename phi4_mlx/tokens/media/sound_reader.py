"""Access of the decoder to a file's bytes, and the notes it would print on standard error."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_ONE_AT_A_TIME = threading.Lock()
_NOTES = re.compile(rb"\[.*libmpg123|Note: |Warning: |$")


class Splice(NamedTuple):
    """Bytes that a decoder reads in place of some of a file.

    Attributes:
        position: in the file.
        removed: bytes of the file that are not read.
        data: what is read in their place.
    """

    position: int
    removed: int
    data: bytes


class SoundReader:
    """A file as libsndfile reads it: no method raises, since an exception in a callback would be printed."""

    def __init__(self, file: BinaryIO, splice: Splice | None) -> None:
        """Begins at the start of the file.

        Args:
            file: what is read.
            splice: a change of it; None for none.
        """
        self._file, self._at = file, 0
        self._splice = splice or Splice(0, 0, b"")
        self._length = file.seek(0, os.SEEK_END) + len(self._splice.data) - self._splice.removed

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position; stays where that is impossible."""
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = at if 0 <= at < 2**62 else self._at
        return self._at

    def tell(self) -> int:
        """The position."""
        return self._at

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; none where the file cannot be read."""
        start, removed, inserted = self._splice
        data = self._read(self._at, min(count, start - self._at))
        if start <= self._at + len(data) < start + len(inserted):
            skipped = self._at + len(data) - start
            data += inserted[skipped : skipped + count - len(data)]
        place = self._at + len(data)
        if place >= start + len(inserted):
            data += self._read(place - len(inserted) + removed, count - len(data))
        self._at += len(data)
        return data

    def _read(self, place: int, count: int) -> bytes:
        if count <= 0:
            return b""
        try:
            self._file.seek(place)
            return self._file.read(count)
        except OSError:
            return b""


@contextlib.contextmanager
def without_decoder_notes() -> Iterator[None]:
    """Keeps the notes of the MP3 decoder from standard error; other threads' lines come a moment later."""
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        try:
            real = os.dup(2)
        except OSError:  # closed
            yield
            return
        stack.callback(os.close, real)
        kept = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(real, 2)
            kept.seek(0)
            for line in kept:
                if not _NOTES.match(line):
                    os.write(real, line)

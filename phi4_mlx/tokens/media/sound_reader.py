"""Access of the decoder to a file's bytes, and the notes it would print on standard error."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from typing import BinaryIO

from phi4_mlx.tokens.media.sound_header import Overlay

_ONE_AT_A_TIME = threading.Lock()
_NOTES = re.compile(rb"\[src/libmpg123/|\[.*libmpg123|Note: |Warning: Xing|Warning: |^$")


class SoundReader:
    """A file as libsndfile reads it: no method raises, since an exception in a callback would be printed."""

    def __init__(self, file: BinaryIO, overlay: Overlay | None) -> None:
        """Begins at the start of the file.

        Args:
            file: what is read.
            overlay: bytes that take the place of those in the file; None for none.
        """
        self._file, self._overlay = file, overlay

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position; stays where that is impossible."""
        with contextlib.suppress(OSError, ValueError, OverflowError):
            self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; none where the file cannot be read."""
        start = self._file.tell()
        try:
            data = self._file.read(count)
        except OSError:
            return b""
        if self._overlay is None:
            return data
        position, patch = self._overlay
        for index, byte in enumerate(patch, position - start):
            if 0 <= index < len(data):
                data = data[:index] + bytes([byte]) + data[index + 1 :]
        return data


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

"""Streaming decoders: token ids to text, one id at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import SupportsIndex


class FallbackByte(bytes):
    """The byte of a token like `<0x0A>`, whose text depends on its neighbours; see `FallbackDecoder`."""


class StreamingDecoder:
    """Decodes ids one at a time, and returns text as soon as its characters are complete."""

    def __init__(self, bytes_of: Callable[[SupportsIndex], bytes]):
        """Starts an answer.

        Args:
            bytes_of: token -> its bytes; empty for an id without text.
        """
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: SupportsIndex) -> str:
        """Adds a token; returns the text that it completes, which may be empty."""
        return self._utf8.decode(self._bytes_of(token))

    def finish(self) -> str:
        """Ends the answer; returns U+FFFD for an incomplete character."""
        return self._utf8.decode(b"", final=True)


class FallbackDecoder(StreamingDecoder):
    """Decodes ids of SentencePiece-style files: a run of byte tokens is UTF-8 as a whole, or U+FFFD for each byte.

    The first character of a run is therefore known only when the run has ended.

    Source: `ByteFallback` in the `tokenizers` library.
    """

    def __init__(self, bytes_of: Callable[[SupportsIndex], bytes], drop_space: bool):
        """Starts an answer.

        Args:
            bytes_of: as in `StreamingDecoder`; a `FallbackByte` for a byte token.
            drop_space: removes a space at the start of the answer.
        """
        super().__init__(bytes_of)
        self._drop_space = drop_space
        self._run = bytearray()

    def add(self, token: SupportsIndex) -> str:
        """As `StreamingDecoder`; a byte token returns no text."""
        data = self._bytes_of(token)
        if isinstance(data, FallbackByte):
            self._run += data
            return ""
        return self._after_run(data.decode()) if data else ""  # an id without text does not end a run

    def finish(self) -> str:
        """As `StreamingDecoder`."""
        return self._after_run("")

    def _after_run(self, text: str) -> str:
        try:
            text = self._run.decode() + text
        except UnicodeDecodeError:
            text = "\ufffd" * len(self._run) + text
        self._run.clear()
        if text and self._drop_space:
            text, self._drop_space = text.removeprefix(" "), False
        return text

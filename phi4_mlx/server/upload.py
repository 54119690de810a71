"""Forms with a file, as they arrive: the file goes to a temporary file, and nothing is held in memory as a whole."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterable
from email.message import Message
from typing import IO

from phi4_mlx.server.apis.wire import WireError
from phi4_mlx.server.limits import FORM_FIELDS_LIMIT, FORM_NAME_CHARS_LIMIT, FORM_VALUE_BYTES

FILE = "file"  # the name of the only field that has one


class Upload:
    """A form of the type multipart/form-data, whose file is deleted by `close`, or with the form.

    Attributes:
        fields: (name, text) of each field, in order.
    """

    def __init__(self, content_type: str) -> None:
        """Prepares for the body.

        Args:
            content_type: the header, which has the boundary.

        Raises:
            WireError: there is no boundary.
        """
        from python_multipart import MultipartParser

        logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it quotes bodies

        boundary = _params(content_type).get("boundary", "")
        if not 1 <= len(boundary) <= FORM_NAME_CHARS_LIMIT:
            raise WireError(400, "the form has no boundary in its content type")
        self.fields: list[tuple[str, str]] = []
        self._file: IO[bytes] | None = None
        self._whole = False
        self._header, self._value, self._disposition = b"", b"", ""
        self._name, self._text, self._to_file = "", bytearray(), False
        self._parser = MultipartParser(
            boundary.encode("latin-1", "replace"),
            {
                "on_part_begin": self._begin, "on_header_field": self._add_header, "on_header_value": self._add_value,
                "on_header_end": self._end_header, "on_headers_finished": self._name_part,
                "on_part_data": self._add_data, "on_part_end": self._end_part, "on_end": self._end,
            },
        )  # fmt: skip

    @property
    def path(self) -> str | None:
        """The file; None if the form has none."""
        return None if self._file is None else self._file.name

    def close(self) -> None:
        """Deletes the file."""
        if self._file is not None:
            self._file.close()

    async def read(self, body: AsyncIterable[bytes]) -> None:
        """Reads the whole form.

        Raises:
            WireError: it is malformed or exceeds a limit.
        """
        from python_multipart.exceptions import MultipartParseError

        try:
            async for data in body:
                await asyncio.to_thread(self._parser.write, data)  # writes to the disk
        except MultipartParseError as error:
            raise WireError(400, f"the body is not a form: {error!s:.200}") from None
        except OSError as error:
            raise WireError(507, f"the file cannot be kept on the server's disk: {error.strerror}", FILE) from None
        if not self._whole:
            raise WireError(400, "the body ends before the form does")
        if self._file is not None:
            self._file.flush()

    def _begin(self) -> None:
        self._disposition, self._text = "", bytearray()
        if len(self.fields) >= FORM_FIELDS_LIMIT:
            raise WireError(400, f"the form has more than {FORM_FIELDS_LIMIT} fields")

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        if len(self._header) + len(self._value) > FORM_VALUE_BYTES:
            raise WireError(400, "the form has a part with a header that is too long")

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value.decode("utf-8", "replace")
        self._header = self._value = b""

    def _name_part(self) -> None:
        params = _params(self._disposition)
        self._name, self._to_file = params.get("name", ""), "filename" in params
        if not 1 <= len(self._name) <= FORM_NAME_CHARS_LIMIT:
            raise WireError(400, "the form has a part without a name, or with a name that is too long")
        if not self._to_file:
            return
        if self._name != FILE:
            raise WireError(400, f"{self._name!r:.80} must be text; only {FILE} is a file", self._name)
        if self._file is not None:
            raise WireError(400, "the form has a second file; send one a request", FILE)
        self._file = tempfile.NamedTemporaryFile(prefix="phi4_mlx-")  # noqa: SIM115

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._to_file and self._file is not None:
            self._file.write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > FORM_VALUE_BYTES:
            raise WireError(400, f"{self._name} has more than {FORM_VALUE_BYTES:,} bytes", self._name)

    def _end_part(self) -> None:
        if self._to_file:
            return
        try:
            self.fields.append((self._name, self._text.decode()))
        except UnicodeDecodeError:
            raise WireError(400, f"{self._name} is not UTF-8", self._name) from None

    def _end(self) -> None:
        self._whole = True


def _params(header: str) -> dict[str, str]:
    """The parameters of a header, such as the name of a part."""
    message = Message()
    message["content-type"] = header.replace("\r", " ").replace("\n", " ")
    found = message.get_params(failobj=[], unquote=True)
    return {key.lower(): value for key, value in found[1:] if isinstance(value, str)}

"""Next-token distributions of two models on the disk: the log-probabilities of some tokens at each place.

Kept are the likeliest tokens of each model, and beside them every n-th token of the vocabulary, which stand for all the
others. Places are numbered through all samples, and each place starts its row of n-th tokens one token later than the
place before, so that every token has the same chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi4_mlx.errors import RequestError

LIKELIEST = 256  # tokens of each model at a place
OTHERS = 512  # tokens at a place that stand for all others

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Columns:
    """The tokens whose log-probabilities are kept.

    Attributes:
        vocabulary: V, the number of tokens.
        likeliest: K, the likeliest tokens kept of each model.
        others: about the number of further tokens.
    """

    vocabulary: int
    likeliest: int = LIKELIEST
    others: int = OTHERS

    @property
    def all_tokens(self) -> bool:
        """True if every token is kept, for so small a vocabulary."""
        return self.vocabulary <= 2 * self.likeliest + self.others

    @property
    def stride(self) -> int:
        """The distance of the tokens that stand for others, and the number of tokens that each stands for."""
        return max(1, self.vocabulary // self.others)

    @property
    def width(self) -> int:
        """W, the number of tokens kept at a place."""
        return self.vocabulary if self.all_tokens else 2 * self.likeliest + -(-self.vocabulary // self.stride)

    @property
    def place_bytes(self) -> int:
        """Bytes that a place takes on the disk, for both models together."""
        return 2 * 4 * (self.width + (0 if self.all_tokens else self.likeliest))

    def ids(self, start: int, a: Array, b: Array) -> Array:
        """The tokens kept at some places.

        Args:
            start: the number of the first place.
            a: likeliest tokens of one model, int32 [N, K]; [N, 0] where all tokens are kept.
            b: likewise of the other.

        Returns:
            int32 [N, W]; one past the vocabulary stands for none.
        """
        places = np.arange(start, start + len(a), dtype=np.int32)[:, None]
        if self.all_tokens:
            return np.broadcast_to(np.arange(self.vocabulary, dtype=np.int32), (len(a), self.vocabulary))
        others = np.arange(0, self.vocabulary, self.stride, dtype=np.int32)[None] + places % self.stride
        return np.concatenate([a, b, np.minimum(others, self.vocabulary)], axis=1)

    def weights(self, ids: Array) -> Array:
        """The number of tokens that each kept token stands for.

        Args:
            ids: from `ids`, [N, W].

        Returns:
            fp64 [N, W]: 1 for a likeliest token, `stride` for one that stands for others, 0 for a repeated one.
        """
        if self.all_tokens:
            return np.ones(ids.shape)
        stands = np.arange(self.width) >= 2 * self.likeliest
        keys = 2 * ids.astype(np.int64) + stands  # a likeliest token goes before the same one among the others
        order = np.argsort(keys, axis=1, kind="stable")
        ordered = np.take_along_axis(ids, order, 1)
        first = np.concatenate([np.ones((len(ids), 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
        weights = np.empty(ids.shape)
        np.put_along_axis(weights, order, first * np.where(stands, self.stride, 1)[order], 1)
        return weights * (ids < self.vocabulary)


class Rows:
    """A file of rows of one width, appended to, and read by ranges.

    Args:
        path: the file, made empty.
        dtype: of the numbers.
        width: numbers in a row.
    """

    def __init__(self, path: Path, dtype: type[np.generic], width: int):
        self._path, self._dtype, self._width = path, np.dtype(dtype), width
        path.write_bytes(b"")

    def append(self, rows: Array) -> None:
        """Appends rows [N, width].

        Raises:
            RequestError: the disk is full.
        """
        try:
            with self._path.open("ab") as file:
                file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        except OSError as error:
            advice = "make room, or set TMPDIR to a folder on another disk"
            raise RequestError(f"{self._path} cannot be written: {error.strerror}; {advice}") from None

    def read(self, start: int, stop: int) -> Array:
        """The rows from `start` up to `stop`, [stop - start, width]."""
        row_bytes, count = self._width * self._dtype.itemsize, (stop - start) * self._width
        with self._path.open("rb") as file:
            file.seek(start * row_bytes)
            return np.fromfile(file, self._dtype, count).reshape(stop - start, self._width)

"""Running digests of the ids in a cache, which leader and followers compute apart and compare before they compute."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

_MODULUS = 2**61 - 1  # a Mersenne prime, so that the values fit 64 bits
_FACTOR = 0x5851F42D4C957F2D % _MODULUS  # Source: Knuth's MMIX generator


class RunningDigest:
    """The digest of every prefix of the ids of one sequence, 8 bytes a token, so that a cut costs nothing.

    Against mistakes, not against forgery.
    """

    def __init__(self) -> None:
        self._after = array("Q", [0])  # by length

    def __len__(self) -> int:
        return len(self._after) - 1

    @property
    def value(self) -> int:
        """The digest of all ids."""
        return self._after[-1]

    def append(self, ids: Iterable[int]) -> None:
        """Appends ids."""
        value = self._after[-1]
        for token in ids:
            value = (value * _FACTOR + token + 1) % _MODULUS
            self._after.append(value)

    def cut(self, length: int) -> None:
        """Keeps the first `length` ids."""
        del self._after[length + 1 :]

    def copy(self, length: int | None = None) -> RunningDigest:
        """Another one, of the first `length` ids; None for all."""
        twin = RunningDigest()
        twin._after = self._after[:] if length is None else self._after[: length + 1]
        return twin


def columns(ids: Sequence[Sequence[int]]) -> list[int]:
    """One number a column of ids [B, T], such as of several sequences that share a cache."""
    if len(ids) == 1:
        return [*ids[0]]
    found = [0] * len(ids[0])
    for row in ids:
        found = [(value * _FACTOR + token + 1) % _MODULUS for value, token in zip(found, row, strict=True)]
    return found

"""Files with single bits flipped."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path


def flipped_bits(file: Path, places: Iterable[int], draw: random.Random) -> Iterator[int]:
    """Flips a random bit of one byte of a file at a time, and restores the file at the end.

    Args:
        file: the file.
        places: the indices of the bytes.
        draw: chooses the bits.

    Yields:
        The index of the byte that differs now.
    """
    whole = file.read_bytes()
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        yield place
    file.write_bytes(whole)


def some_bytes(file: Path, count: int, draw: random.Random) -> list[int]:
    """The indices of random bytes of a file."""
    return draw.choices(range(file.stat().st_size), k=count)

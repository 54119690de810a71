"""The beginning that two sequences have in common."""

from __future__ import annotations

from collections.abc import Iterable


def shared_length(one: Iterable[object], other: Iterable[object]) -> int:
    """The number of equal items at the beginning of two sequences."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count

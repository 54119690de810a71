"""The beginning that two sequences have in common."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from phi4_mlx.tokens.prefix import shared_length


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], (1, 2), 2), ([1, 2, 3], [1, 5, 3], 1), ("abc", "xbc", 0)],
)
def test_the_shared_length_ends_at_the_first_difference(
    one: Sequence[object], other: Sequence[object], length: int
) -> None:
    assert shared_length(one, other) == shared_length(other, one) == length

"""Amounts in messages: a singular noun stands after 1 alone."""

from __future__ import annotations

import pytest

from phi4_mlx.terminal.amount import amount


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 tokens"), (1, "1 token"), (1.0, "1 token"), (2, "2 tokens"), (1200, "1,200 tokens"), (3.9, "3.9 tokens"),
     (0.4, "0.4 tokens"), (0.045, "0.045 tokens")],
)  # fmt: skip
def test_a_number_with_its_noun(count: float, shown: str) -> None:
    assert amount(count, "token") == shown


def test_a_noun_with_a_plural_of_its_own() -> None:
    assert [amount(n, "matrix", "matrices") for n in (1, 2)] == ["1 matrix", "2 matrices"]

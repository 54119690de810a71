"""Amounts in messages: a singular noun stands after 1 alone."""

from __future__ import annotations

import pytest

from phi4_mlx.terminal.amount import amount, size


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 tokens"), (1, "1 token"), (1.0, "1 token"), (2, "2 tokens"), (1200, "1,200 tokens"), (3.9, "3.9 tokens"),
     (0.4, "0.4 tokens"), (0.045, "0.045 tokens")],
)  # fmt: skip
def test_a_number_with_its_noun(count: float, shown: str) -> None:
    assert amount(count, "token") == shown


def test_a_noun_with_a_plural_of_its_own() -> None:
    assert [amount(n, "matrix", "matrices") for n in (1, 2)] == ["1 matrix", "2 matrices"]


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (999.7, "1.00 KB"), (1000, "1.00 KB"), (131_072, "131 KB"),
     (999_499, "999 KB"), (999_500, "1.00 MB"), (9_994_000, "9.99 MB"), (9_995_000, "10.0 MB"), (41_230_000, "41.2 MB"),
     (999_600_000, "1.00 GB"), (1_500_000_000, "1.50 GB"), (137.4e9, "137 GB"), (1.2e12, "1,200 GB")],
)  # fmt: skip
def test_bytes_have_three_digits_and_a_unit_in_which_they_are_not_0(nbytes: float, shown: str) -> None:
    assert size(nbytes) == shown

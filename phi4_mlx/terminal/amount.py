"""An amount with its noun, as messages show it."""

from __future__ import annotations


def amount(count: float, noun: str, plural: str | None = None) -> str:
    """A number and its noun: "1 token", "1,200 tokens", "0.4 epochs".

    Args:
        count: shown with a digit after the point unless it is whole, and with two below 1.
        noun: in the singular.
        plural: None for the noun with an s.
    """
    number = (f"{count:,.1f}" if count >= 1 else f"{count:.2g}").removesuffix(".0")
    return f"{number} {noun if number == '1' else plural or f'{noun}s'}"

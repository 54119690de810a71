"""Amounts as messages show them: a number with its noun, bytes, and durations."""

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


def size(nbytes: float) -> str:
    """A number of bytes in three digits: "1.50 GB", "41.2 MB", "128 KB", "1 byte"; a GB has 10^9."""
    for unit, power in (("GB", 9), ("MB", 6), ("KB", 3)):
        value = nbytes / 10**power
        if value >= 0.9995:  # 999.5 and more of the smaller unit
            return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return amount(round(nbytes), "byte")


def duration(seconds: float) -> str:
    """A duration in text, as precise as an estimate can be."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

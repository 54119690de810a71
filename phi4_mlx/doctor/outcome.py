"""The outcome of a check, as the process that computes hands it to the one that reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class Outcome(TypedDict):
    """The JSON of a check.

    Attributes:
        name: of the check.
        passed: True if no difference exceeds the tolerance.
        devices: the largest difference of another device from the CPU; None where there is one device.
        twins: the largest difference of the fast paths from their slow twins on a device; None where there are none.
        tolerance: the allowed difference.
        why: its derivation.
        error: of a computation that did not end; None otherwise.
        switch_off: the fast paths without which the check passes, where it failed; empty if none helps.
    """

    name: str
    passed: bool
    devices: float | None
    twins: float | None
    tolerance: float
    why: str
    error: str | None
    switch_off: list[str]


def failed(name: str, error: str, switch_off: Sequence[str] = ()) -> Outcome:
    """The outcome of a check that did not end."""
    return {
        "name": name, "passed": False, "devices": None, "twins": None, "tolerance": 0.0, "why": "", "error": error,
        "switch_off": [*switch_off],
    }  # fmt: skip

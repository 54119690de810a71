"""A wait for something that another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG_S = 120.0  # whatever takes longer is stuck


def until(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)

"""A wait for something that another process does."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.e2e.server_process import HANG_S


def until(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)

"""The machine: its memory, as far as MLX may use it, and the time that work takes on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import mlx.core as mx


def memory_limit() -> int:
    """Usable bytes: Metal's recommended working set, or else the machine's memory."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return machine_bytes()


def machine_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def median_seconds(work: Callable[[], object], runs: int) -> float:
    """The median time of some work in several runs, after one that does not count."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)

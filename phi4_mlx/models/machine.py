"""The memory of the machine, as far as MLX may use it."""

from __future__ import annotations

import os

import mlx.core as mx


def memory_limit() -> int:
    """Usable bytes: Metal's recommended working set, or else the machine's memory."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return machine_bytes()


def machine_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""The memory that the machine has left, and the share of it that caches may keep.

The system's own signal comes first: on macOS the level of memory pressure, at which it begins to compress and to swap;
on Linux what programs can have without swapping, and the limit of the control group, as of a container.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from phi4_mlx.models.machine import machine_bytes

RESERVE = 1 / 16  # of the machine's memory, which caches leave to others
NORMAL, WARNING, CRITICAL = 1, 2, 4  # Source: `kern.memorystatus_vm_pressure_level` in XNU's kern_memorystatus_notify.c
_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Reading:
    """The memory of the machine at one moment.

    Attributes:
        available_bytes: what programs can have without swapping.
        total_bytes: all of it.
        level: of pressure, `NORMAL`, `WARNING` or `CRITICAL`.
    """

    available_bytes: int
    total_bytes: int
    level: int = NORMAL


def share_of(reading: Reading | None, used_bytes: int, share_bytes: int, most_bytes: int) -> int:
    """The bytes that caches may have from now on.

    Below the reserve they give back what is missing; from twice the reserve on they get what is above it. Between the
    two nothing changes, so that the share does not swing.

    Args:
        reading: of this moment; None where the system gives none.
        used_bytes: what the caches have.
        share_bytes: what they may have so far.
        most_bytes: what they may ever have.
    """
    if reading is None:
        return most_bytes
    if reading.level >= CRITICAL:
        return 0
    reserve = int(reading.total_bytes * RESERVE)
    missing, spare = reserve - reading.available_bytes, reading.available_bytes - 2 * reserve
    if reading.level >= WARNING:
        missing = max(missing, used_bytes // 2)
    if missing > 0:
        return max(0, min(share_bytes, used_bytes - missing))
    if spare > 0 and reading.level < WARNING:
        return min(most_bytes, max(share_bytes, used_bytes + spare))
    return share_bytes


def read_memory() -> Reading | None:
    """The memory of this machine now; None where the system does not say."""
    try:
        return _read_macos() if sys.platform == "darwin" else _read_linux()
    except (OSError, ValueError, KeyError, AttributeError, IndexError):
        return None


def _read_linux(meminfo: Path = Path("/proc/meminfo"), group: Path = _GROUP) -> Reading:
    lines = (line.split() for line in _text(meminfo).splitlines())
    kilobytes = {words[0]: int(words[1]) for words in lines if len(words) > 1}
    available, total = kilobytes["MemAvailable:"] * 1024, kilobytes["MemTotal:"] * 1024
    try:  # a container's own limit, in version 2 of control groups
        limit, used = int(_text(group / "memory.max")), int(_text(group / "memory.current"))
        held = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    except (OSError, ValueError):  # none, or "max"
        return Reading(available, total)
    free = limit - used + int(held.get("inactive_file", 0))  # pages of files, which the system takes back
    return Reading(max(0, min(available, free)), min(total, limit))


def _text(path: Path) -> str:
    """A file of the kernel's, whose size is 0 until it is read."""
    return path.read_text()


def _read_macos() -> Reading:
    """The level alone: what is free says little where the system compresses memory before it swaps."""
    total = machine_bytes()
    return Reading(total, total, _sysctl("kern.memorystatus_vm_pressure_level"))


def _sysctl(name: str) -> int:
    """An integer of the kernel, of 4 or 8 bytes."""
    value, length = ctypes.c_uint64(0), ctypes.c_size_t(8)
    if _libc().sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(length), None, ctypes.c_size_t(0)):
        raise OSError(f"the system has no {name}")
    return value.value


@cache
def _libc() -> Any:  # ctypes gives functions of a library no types
    return ctypes.CDLL(None)

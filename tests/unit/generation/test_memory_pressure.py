"""The share of the memory that caches may have, from readings of what the machine has left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from phi4_mlx.generation import memory_pressure
from phi4_mlx.generation.memory_pressure import CRITICAL, NORMAL, WARNING, Reading, read_memory, share_of

TOTAL, RESERVE = 16_000, 1_000


@pytest.mark.parametrize(
    ("available", "level", "used", "share", "expected"),
    [
        (8_000, NORMAL, 2_000, 4_000, 4_000),  # enough: all of it, which is the most
        (8_000, NORMAL, 500, 1_000, 4_000),  # grows back
        (2_300, NORMAL, 500, 600, 800),  # by what is above twice the reserve
        (1_500, NORMAL, 500, 700, 700),  # between the two, nothing changes
        (900, NORMAL, 2_000, 4_000, 1_900),  # gives back what is missing
        (900, NORMAL, 50, 4_000, 0),
        (0, NORMAL, 4_000, 4_000, 3_000),
        (8_000, WARNING, 2_000, 4_000, 1_000),  # half at once, whatever is available
        (8_000, WARNING, 0, 300, 300),
        (8_000, CRITICAL, 2_000, 4_000, 0),
    ],
)
def test_the_share_follows_a_reading(available: int, level: int, used: int, share: int, expected: int) -> None:
    assert share_of(Reading(available, TOTAL, level), used, share, 4_000) == expected


def test_without_a_reading_the_share_is_the_most() -> None:
    assert share_of(None, 10, 20, 4_000) == 4_000


def test_a_steady_machine_comes_to_rest() -> None:
    """Caches that take all of their share from what is available: it does not swing."""
    others, share, shares = 11_000, 4_000, []
    for _ in range(30):
        used = share
        share = share_of(Reading(TOTAL - others - used, TOTAL), used, share, 4_000)
        shares.append(share)
    assert len(set(shares[2:])) == 1 and TOTAL - others - shares[-1] >= RESERVE


def test_this_machine_has_a_reading() -> None:
    reading = read_memory()
    if sys.platform in ("linux", "darwin"):
        assert reading is not None and 0 < reading.available_bytes <= reading.total_bytes
        assert reading.level in (NORMAL, WARNING, CRITICAL)


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable:  800 kB\nHugePages_Total: 0\n")

    def reading(**files: str) -> Reading:
        for name, text in files.items():
            (tmp_path / f"memory.{name}").write_text(text)
        return memory_pressure._read_linux(tmp_path / "meminfo", tmp_path)

    assert reading() == Reading(819_200, 1_024_000)
    assert reading(max="max\n", current="400000\n", stat="anon 1\ninactive_file 50000\n") == Reading(819_200, 1_024_000)
    assert reading(max="500000\n") == Reading(150_000, 500_000)
    assert reading(current="900000\n") == Reading(0, 500_000)


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB", "MemTotal: x kB\nMemAvailable: 1 kB"])
def test_a_system_that_says_nothing_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "meminfo").write_text(text)
    read = memory_pressure._read_linux
    monkeypatch.setattr(memory_pressure, "_read_linux", lambda: read(tmp_path / "meminfo"))
    monkeypatch.setattr(memory_pressure.sys, "platform", "linux")
    assert read_memory() is None


class Library:
    """The C library of a Mac, with some of its numbers."""

    def __init__(self, **numbers: int) -> None:
        self.numbers = numbers

    def sysctlbyname(self, name: bytes, value: object, length: object, new: object, new_length: object) -> int:
        number = self.numbers.get(name.decode().rpartition(".")[2])
        if number is None:
            return -1
        value._obj.value = number  # type: ignore[attr-defined]  # of ctypes.byref
        return 0


@pytest.mark.parametrize("level", [NORMAL, WARNING, CRITICAL])
def test_a_mac_says_its_level(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    library = Library(memorystatus_vm_pressure_level=level)
    monkeypatch.setattr(memory_pressure.sys, "platform", "darwin")
    monkeypatch.setattr(memory_pressure, "machine_bytes", lambda: 2**34)
    monkeypatch.setattr(memory_pressure, "_libc", lambda: library)
    reading = read_memory()
    assert reading == Reading(2**34, 2**34, level)
    assert share_of(reading, 1_000, 4_000, 4_000) == {NORMAL: 4_000, WARNING: 500, CRITICAL: 0}[level]
    library.numbers.clear()
    assert read_memory() is None

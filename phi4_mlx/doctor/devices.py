"""The devices of this machine that MLX computes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Device:
    """A device to compute on.

    Attributes:
        name: "cpu" or "gpu".
        use: a context in which it is the default one.
    """

    name: str
    use: Callable[[], contextlib.AbstractContextManager[None]]


def devices() -> list[Device]:
    """The CPU, whose results the others are compared with, and the GPU if MLX has one."""
    found = [Device("cpu", lambda: _default(mx.Device(mx.cpu)))]
    if mx.is_available(mx.gpu):
        found.append(Device("gpu", lambda: _default(mx.Device(mx.gpu))))
    return found


@contextlib.contextmanager
def _default(device: mx.Device) -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(device)
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_default_device(before)

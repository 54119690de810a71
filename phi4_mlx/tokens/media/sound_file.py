"""Sound from files, bytes and arrays, decoded block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import RequestError

if TYPE_CHECKING:
    from phi4_mlx.tokens.media.log_mel import Wave

Source = str | PathLike[str] | bytes | tuple[Any, Any]


@dataclass(frozen=True)
class Sound:
    name: str
    rate: int
    blocks: Callable[[], Iterator[Wave]]


@contextlib.contextmanager
def open_sound(source: Source, longest_s: float | None) -> Iterator[Sound]:
    import numpy as np

    if isinstance(source, tuple):
        wave, rate = source
        wave = np.asarray(wave)
        yield Sound("the sound", int(rate), lambda: iter([wave.astype(np.float64)]))
    else:
        import io

        import soundfile

        wave, rate = soundfile.read(io.BytesIO(source) if isinstance(source, bytes) else source, dtype="float64", always_2d=True)
        if len(wave) / rate > (longest_s or 1e18):
            raise RequestError("too long")
        yield Sound("the sound", rate, lambda: iter([wave.mean(axis=1)]))

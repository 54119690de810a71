"""Parts of tensors, read from safetensors files without the bytes around them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from phi4_mlx.errors import CheckpointError
from phi4_mlx.files.dtypes import DTYPES
from phi4_mlx.files.regular_file import open_regular
from phi4_mlx.files.safetensors import Stored

MOST = 2**24  # bytes of one read; macOS refuses 2**31


def read_part(stored: Stored, axis: int = 0, ranges: Sequence[tuple[int, int]] | None = None) -> bytearray:
    """Reads a part of a tensor, and no other byte of its numbers.

    Args:
        stored: the tensor.
        axis: that the ranges cut.
        ranges: of indices along the axis, in order; None for the whole tensor.

    Returns:
        The numbers of the part, outermost dimension first.

    Raises:
        CheckpointError: the file cannot be read, or was cut since its header was read.
    """
    info = stored.info
    ranges = [(0, info.shape[axis] if info.shape else 1)] if ranges is None else ranges
    inner = math.prod(info.shape[axis + 1 :]) * DTYPES[info.dtype].bits // 8  # bytes of one index along the axis
    row = (info.shape[axis] if info.shape else 1) * inner
    found = bytearray(math.prod(info.shape[:axis]) * sum(end - start for start, end in ranges) * inner)
    room = memoryview(found)
    try:
        with open_regular(stored.path) as file:
            for number in range(math.prod(info.shape[:axis])):
                for start, end in ranges:
                    offset, length = info.start + number * row + start * inner, (end - start) * inner
                    _fill(file.fileno(), room[:length], offset)
                    room = room[length:]
    except OSError as error:
        raise CheckpointError(f"{stored.path} cannot be read: {error.strerror}") from None
    except EOFError:
        raise CheckpointError(f"{stored.path} was cut while {stored.name} was read; load the model again") from None
    return found


def _fill(descriptor: int, room: memoryview, offset: int) -> None:
    while room:
        found = os.pread(descriptor, min(len(room), MOST), offset)
        if not found:
            raise EOFError
        room[: len(found)] = found
        room, offset = room[len(found) :], offset + len(found)

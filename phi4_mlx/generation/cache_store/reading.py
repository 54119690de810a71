"""A file of the store in the host's memory, read and checked by any thread, without MLX."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from phi4_mlx.errors import CheckpointError
from phi4_mlx.files.dtypes import mlx_dtype
from phi4_mlx.files.regular_file import open_regular
from phi4_mlx.files.safetensors import Header, read_whole_header


@dataclass(frozen=True)
class Read:
    """The content of a file, whose checksum is right.

    Attributes:
        path: the file.
        header: of the file.
        buffers: the bytes of each tensor but the checksum, by name.
    """

    path: Path
    header: Header
    buffers: dict[str, NDArray[np.uint8]]

    def take_tensors(self) -> dict[str, mx.array]:
        """The tensors as arrays, for the thread that generates; the second call finds none.

        Each buffer is dropped once it is copied.
        """
        buffers, found = self.buffers.copy(), {}
        self.buffers.clear()  # also where the copying fails
        for name in [*buffers]:
            info = self.header.tensors[name]
            found[name] = mx.array(buffers.pop(name)).view(mlx_dtype(info.dtype)).reshape(info.shape)
        return found


def read_file(path: Path) -> Read:
    """Reads a file and checks it.

    Raises:
        CheckpointError: the file cannot be read or is damaged; an OSError is its context.
    """
    header = read_whole_header(path, "it is dropped", "prompt cache file")
    ordered = sorted(header.tensors.items(), key=lambda item: item[1].start)
    buffers: dict[str, NDArray[np.uint8]] = {}
    try:
        with open_regular(path) as file:
            file.seek(len(header.raw))
            digest = hashlib.sha256(header.raw)
            for name, info in ordered:
                buffer = np.empty(info.end - info.start, np.uint8)
                if file.readinto(buffer.data) != buffer.size:
                    raise CheckpointError(f"{path} is damaged: it shrank while it was read; it is dropped")
                if name == "checksum":
                    break
                buffers[name] = buffer
                digest.update(buffer.data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if len(buffers) != len(ordered) - 1 or buffer.tobytes() != digest.digest():
        raise CheckpointError(f"{path} is damaged: its checksum is wrong; it is dropped")
    return Read(path, header, buffers)

"""Writers of a cache store that are killed at random moments: `python -m tests.store_kills FOLDER KILLS`.

Each writer is a process of its own, which stores files of up to a megabyte under a limit of four until SIGKILL comes.
After each kill, every file in the folder is read and checked. The last line is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from phi4_mlx.files.safetensors import header_of, read_whole_header
from phi4_mlx.generation.cache_store.catalogue import Catalogue
from phi4_mlx.generation.cache_store.entries import StoredEntry, match_of, packed
from phi4_mlx.generation.cache_store.folder import SUFFIX, StoreFolder, private_folder
from phi4_mlx.generation.cache_store.writer import Waiting, Writer
from phi4_mlx.generation.prompt_cache_content import CHECKSUM, FORMAT

LIMIT_BYTES = 4_000_000
LATEST_S = 0.15  # of a kill, from the first write on


def waiting(draw: random.Random) -> Waiting:
    """A file of random content, as a store hands it to its writer."""
    ids = [draw.randrange(2**30) for _ in range(draw.randrange(50, 500))]
    data = draw.randbytes(draw.randrange(1000, 1_000_000))
    layout = {"ids": ("I32", (len(ids),)), "layers.0.keys": ("U8", (len(data),)), "checksum": CHECKSUM}
    about = {FORMAT: "2", "phi4_mlx.model": "random"}
    buffers = [memoryview(b"".join(each.to_bytes(4, "little") for each in ids)), memoryview(data)]
    keys = packed(ids)
    name = hashlib.sha256(keys).hexdigest()[:32] + SUFFIX
    size = len(header_of(layout, about)) + sum(map(len, buffers)) + 32
    entry = StoredEntry(name, size, match_of({"model": "random"}), None, keys, None)
    return Waiting(entry, layout, about, buffers, 0.0, True)


def write_until_killed(folder: Path, seed: int, begun: int) -> None:
    """The process that is killed."""
    store, draw = StoreFolder(folder, LIMIT_BYTES), random.Random(seed)
    writer = Writer(store, Catalogue(store, print), print)
    ready = [waiting(draw) for _ in range(6)]
    os.write(begun, b"x")
    while True:
        for each in ready:
            writer.add(each)
        writer.flush(60.0)


def torn(folder: Path) -> list[str]:
    """The files of the store whose content is not what was to be written, or that a reader refuses."""
    lines: list[str] = []
    Catalogue(StoreFolder(folder, LIMIT_BYTES), lines.append).refresh()
    for path in folder.iterdir():
        if not path.name.startswith("."):
            data, end = path.read_bytes(), read_whole_header(path).tensors["checksum"].start
            if hashlib.sha256(data[:end]).digest() != data[end:]:
                lines.append(path.name)
    return lines


def main(folder: Path, kills: int) -> None:
    """Starts and kills writers."""
    private_folder(folder)
    draw, found, largest, left = random.Random(kills), [], 0, 0
    for seed in range(kills):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            write_until_killed(folder, seed, write)
        os.read(read, 1)
        time.sleep(draw.uniform(0.0, LATEST_S))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
        found += torn(folder)
        largest = max(largest, sum(path.stat().st_size for path in folder.iterdir()))
        left += any(path.name.startswith(".") for path in folder.iterdir())
    about = {"kills": kills, "torn": found, "largest": largest, "limit": LIMIT_BYTES, "left_half_written": left}
    print(json.dumps(about))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

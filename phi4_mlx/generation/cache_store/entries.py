"""The entries of a store: what a file's header and ids say of the prompts that its cache can serve."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.regular_file import open_regular
from phi4_mlx.generation.prompt_cache_content import FORMAT, VERSIONS, own_metadata, places_in, snapshots_in
from phi4_mlx.models.cached_tokens import conditions_of
from phi4_mlx.tokens.prompt import Place, keys_of

Match = tuple[str | None, ...]

MAX_LOSS = 0.1  # share of an entry's tokens that may be prefilled again if a longer entry replaces it
MAX_HEADER_BYTES = 2**24  # 64 layers with eight snapshots have 0.2 MB
_KEY_BYTES = 8
_MATCHED = ("model", "adapter", "tokenizer", "made_by", "regime", "pinned", "kv_bits", "max_kv_size", "num_layers")


@dataclass(frozen=True, eq=False)
class StoredEntry:
    """A cache in the store, or on its way there.

    Attributes:
        name: of the file.
        nbytes: its size.
        match: what must be equal for a prompt to be served: fingerprints, versions, RoPE table and cache options.
        projection: of sound, as in `Conditions`.
        keys: of all its tokens, as `packed`.
        snapshots: the lengths that it can be cut to; None for any length.
    """

    name: str
    nbytes: int
    match: Match
    projection: str | None
    keys: bytes
    snapshots: tuple[int, ...] | None

    def __len__(self) -> int:
        return len(self.keys) // _KEY_BYTES

    def reusable(self, keys: bytes, beyond: int = 0) -> int:
        """Tokens of a prompt that the entry can serve, if they are more than `beyond`; else 0 or a smaller number."""
        end = beyond * _KEY_BYTES
        last = slice(max(0, end - _KEY_BYTES), end)  # tells most of thousands of entries apart at once
        if self.keys[last] != keys[last] or not self.keys.startswith(keys[:end]):
            return 0
        shared = shared_keys(np.frombuffer(self.keys, np.int64), np.frombuffer(keys, np.int64))
        if self.snapshots is None or shared == len(self):
            return shared
        return max((length for length in self.snapshots if length <= shared), default=0)

    def serves(self, other: StoredEntry, loss: float = 0.0) -> bool:
        """True if this entry holds all tokens of another one, but for `loss` of them."""
        least = math.ceil(len(other) - loss)
        fits = self.match == other.match and hold(self.projection, other.projection)
        return fits and self.reusable(other.keys, least) >= least

    def replaces(self, other: StoredEntry) -> bool:
        """True if this entry serves what `other` does, at a loss of at most `MAX_LOSS`."""
        return self.keys.startswith(other.keys) and self.serves(other, MAX_LOSS * len(other))


def hold(projection: str | None, needed: str | None) -> bool:
    """True if tokens with this projection of sound can go on with that one."""
    return None in (projection, needed) or projection == needed


def packed(keys: Iterable[int]) -> bytes:
    """Keys of tokens, as 64-bit integers."""
    return array("q", keys).tobytes()


def match_of(own: Mapping[str, str]) -> Match:
    """What must be equal, from our own metadata."""
    return tuple(own.get(name) for name in _MATCHED)


def projection_of(places: Iterable[Place]) -> str | None:
    """The projection of the sounds among media."""
    return conditions_of([*places], "short", None, frozenset()).projection


def read_entry(path: Path) -> StoredEntry | None:
    """The entry of a file, of which the header and the ids are read; None if it has another version.

    Thousands of files are read at a start, so the claims of a header are verified only when its cache is read.

    Raises:
        CheckpointError: the file cannot be read, is damaged or is not a prompt cache; an OSError is its context.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"its header claims {length:,} bytes, in a file of {size:,}")
            header = json.loads(file.read(length))
            metadata = header["__metadata__"]
            if metadata[FORMAT] not in VERSIONS:
                return None
            end = header["checksum"]["data_offsets"][1] + 8 + length
            if size != end:
                raise ValueError(f"it has {size:,} bytes, and its tensors end at byte {end:,}")
            start, stop = header["ids"]["data_offsets"]
            if start != 0 or not 0 < stop <= size:
                raise ValueError(f"its ids are at bytes {start} to {stop}, not first")
            ids = np.frombuffer(file.read(stop), "<i4")
        return _entry(path.name, size, own_metadata(metadata), ids)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError, RequestError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is damaged: {reason:.200}; it is dropped") from None


def _entry(name: str, size: int, own: Mapping[str, str], ids: NDArray[np.int32]) -> StoredEntry:
    places = places_in(own)
    keys = packed(keys_of(ids.tolist(), places)) if places else ids.astype(np.int64).tobytes()
    snapshots = tuple(snapshots_in(own)) if "snapshots" in own else None
    return StoredEntry(name, size, match_of(own), projection_of(places), keys, snapshots)


def shared_keys(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """The number of keys that two sequences begin with alike."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n

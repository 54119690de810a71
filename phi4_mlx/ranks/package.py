"""The fingerprint of a package by its files: quick enough for every start, however large the weights are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from phi4_mlx.files.regular_file import TOKENIZER_BYTES, open_regular, read_regular
from phi4_mlx.files.safetensors import read_header, weight_files

SAMPLE_BYTES = 256
"""Read from the middle of each tensor: another training or quantisation changes nearly every number."""

READ_WHOLE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json")
_ADAPTERS = ("adapters.safetensors", "adapter_model.safetensors")


def files_fingerprint(path: Path) -> str:
    """The fingerprint of a model's package or of an adapter; 16 hexadecimal digits.

    It covers the configs and the tokenizer whole, the headers of the weights, and a sample of every tensor. It is
    there against mix-ups, not against forgery.

    Args:
        path: a folder; of an adapter also a file of tensors, with its config beside it.

    Raises:
        CheckpointError: a file of weights is missing or damaged.
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    folder = path if path.is_dir() else path.parent
    for name in READ_WHOLE:
        if os.path.lexists(folder / name):
            digest.update(f"{name}\n".encode() + read_regular(folder / name, TOKENIZER_BYTES))
    for weights in _weights(path):
        header = read_header(weights)
        with open_regular(weights) as file:
            for name, info in sorted(header.items()):
                file.seek(max(info.start, (info.start + info.end - SAMPLE_BYTES) // 2))
                sample = file.read(min(SAMPLE_BYTES, info.end - info.start))
                digest.update(f"{name} {info.dtype} {info.shape}\n".encode() + sample)
    return digest.hexdigest()[:16]


def _weights(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if found := [path / name for name in _ADAPTERS if (path / name).is_file()]:
        return found
    return [*sorted(set(weight_files(path).values())), *sorted(path.glob(f"*/{_ADAPTERS[1]}"))]

"""Fingerprints of models, adapters and tensor files: SHA-256 over names and sums of bits.

The hash covers the sum of the 32-bit words of each tensor row, which the device computes about as fast as it reads
memory. Any single flipped bit changes a sum. This guards against damage and mix-ups, not against forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from phi4_mlx.adapters.layers import adapter_layers, adapter_parameters
from phi4_mlx.models.model import LanguageModel

WITHOUT = "none"  # the fingerprint of a model without an adapter


def base_fingerprint(model: LanguageModel) -> str:
    """The fingerprint of a base model, from its config and all its tensors; 32 hexadecimal digits.

    Args:
        model: with or without an adapter; lazy weights are read, except those that text never needs. Fusing an adapter
            changes the fingerprint.
    """
    trained = adapter_parameters(model)
    parameters = [(name, array) for name, array in tree_flatten(model.parameters()) if not model.on_demand(name)]
    base = {name.replace(".linear.", "."): array for name, array in parameters if name not in trained}
    return _fingerprint(model.config.to_dict(), base)


def adapter_fingerprint(model: LanguageModel) -> str:
    """The fingerprint of the adapter on a model, from its kinds, scales and tensors; `WITHOUT` if none is on."""
    on = {path: (layer.kind, layer.scale) for path, layer in adapter_layers(model).items() if layer.on}
    trained = {name: array for name, array in adapter_parameters(model).items() if name.rpartition(".")[0] in on}
    return _fingerprint(on, trained) if on else WITHOUT


def named_fingerprint(model: LanguageModel, name: str) -> str:
    """The fingerprint of one of the adapters that a model has by name, from its tensors."""
    assert model.adapters is not None
    return _fingerprint({}, model.adapters.arrays(name))


def checksum(header: bytes, arrays: Iterable[mx.array]) -> bytes:
    """The digest of some bytes and arrays, 32 bytes."""
    return hashlib.sha256(header + _sums(arrays)).digest()


def _fingerprint(about: Any, arrays: Mapping[str, mx.array]) -> str:
    ordered = sorted(arrays.items())
    described = [about, [(name, str(array.dtype), array.shape) for name, array in ordered]]
    header = json.dumps(described, sort_keys=True, default=str).encode()
    return checksum(header, (array for _, array in ordered)).hex()[:32]


def _sums(arrays: Iterable[mx.array]) -> bytes:
    """Row sums along the last axis, modulo 2**32."""
    return bytes(memoryview(mx.concatenate([_words(array).sum(axis=-1).reshape(-1) for array in arrays])))


def _words(array: mx.array) -> mx.array:
    """The bits of an array as 32-bit integers, or narrower ones where a row is not a multiple of 4 bytes."""
    array = array.reshape(-1) if array.ndim == 0 else array
    row_bytes = array.shape[-1] * array.itemsize
    if row_bytes % 4 == 0:
        return array.view(mx.uint32)
    return array.view(mx.uint16 if row_bytes % 2 == 0 else mx.uint8).astype(mx.uint32)

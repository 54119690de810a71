"""A prompt cache as a file, so that what was prefilled once is read the next time.

A safetensors file: the ids, the arrays of each layer, a checksum. Its metadata names what the numbers hang on: model,
adapter and tokenizer by a fingerprint, the RoPE table. They fit nothing else, so anything else is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, overload

import mlx.core as mx

from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.atomic import replacing
from phi4_mlx.files.dtypes import name_of
from phi4_mlx.files.safetensors import Header, TensorWriter, read_whole_header
from phi4_mlx.fingerprint import WITHOUT, adapter_fingerprint, base_fingerprint, checksum
from phi4_mlx.models.cache import PromptCache
from phi4_mlx.models.text import Model

_FORMAT, _VERSION = "phi4_mlx_prompt_cache", "1"
_OWN = "phi4_mlx."  # what stands before the names of our metadata
_MAKE_ANEW = "make it anew, with cache-prompt or save_prompt_cache"
_PLAIN = ("keys", "values")
_QUANTISED = ("keys", "keys.scales", "keys.biases", "values", "values.scales", "values.biases")
_CHECKSUM = ("U8", (32,))


class Tokenizer(Protocol):
    """What is asked of a tokenizer here."""

    def fingerprint(self) -> str: ...


def save_prompt_cache(
    path: str | Path, cache: PromptCache, model: Model, tokenizer: Tokenizer, metadata: Mapping[str, str] | None = None
) -> int:
    """Writes a prompt cache to a file, readable by its owner only, in the place of one that is there.

    Args:
        path: the file. It is whole or absent: it takes its name when it is on the disk.
        cache: from `model.make_cache()`, with a prompt in it; B must be 1.
        model: the one that filled it, with the same adapter.
        tokenizer: the one that made the ids.
        metadata: what else the file shall say; no name begins with "phi4_mlx".

    Returns:
        The size of the file in bytes.

    Raises:
        RequestError: the cache is empty, has forgotten tokens, holds several sequences, or does not know its ids;
            the metadata are no texts by name; there is something at the path that is no regular file.
        OSError: the file cannot be written; the older one is still there.
    """
    path = Path(os.path.expanduser(path))
    _check_savable(cache)
    _check_metadata(metadata or {})
    tensors = {"ids": cache.ids[0].astype(mx.int32)}
    for layer, held in enumerate(cache):
        tensors |= zip(_names(layer, held.bits), held.state, strict=True)
    own = {**_identity(model, tokenizer), **_shape(cache)}
    about = {_FORMAT: _VERSION, **(metadata or {}), **{f"{_OWN}{name}": value for name, value in own.items()}}
    layout = {name: (name_of(array.dtype), array.shape) for name, array in tensors.items()}
    with replacing(path) as partial:
        with TensorWriter(partial, layout | {"checksum": _CHECKSUM}, about) as writer:
            os.chmod(partial, 0o600)
            for name, array in tensors.items():
                writer.write(name, [memoryview(mx.contiguous(array).view(mx.uint8))])
            writer.write("checksum", [checksum(writer.header, tensors.values())])
        size = partial.stat().st_size
    return size


@overload
def load_prompt_cache(path: str | Path, model: Model, tokenizer: Tokenizer) -> PromptCache: ...


@overload
def load_prompt_cache(
    path: str | Path, model: Model, tokenizer: Tokenizer, return_metadata: Literal[True]
) -> tuple[PromptCache, dict[str, str]]: ...


def load_prompt_cache(path: str | Path, model: Model, tokenizer: Tokenizer, return_metadata: bool = False) -> Any:
    """Reads a prompt cache, which goes on exactly as the one that was saved.

    Args:
        path: what `save_prompt_cache` wrote.
        model: the one that filled it, with the same adapter; lazy weights are read for their hash.
        tokenizer: the one that made its ids.
        return_metadata: whether to return the caller's metadata too.

    Returns:
        The cache; `cache.reuse(ids)` says which ids of a whole prompt are still to be prefilled. With
        `return_metadata`, (cache, metadata).

    Raises:
        CheckpointError: there is no such file, it is damaged or no prompt cache, or it was made with another model,
            adapter or tokenizer.
    """
    path = Path(os.path.expanduser(path))
    header = _read_header(path)
    own = {name.removeprefix(_OWN): value for name, value in header.metadata.items() if name.startswith(_OWN)}
    tensors = _read_tensors(path, header)
    for what, wanted in _identity(model, tokenizer).items():
        if own.get(what) != wanted:
            _refuse(path, what, own.get(what) == WITHOUT, wanted == WITHOUT)
    bits, pinned, most = (json.loads(own[name]) for name in ("kv_bits", "pinned", "max_kv_size"))
    cache = model.make_cache(pinned, bits, most)
    states = [[tensors[name] for name in _names(layer, bits)] for layer in range(len(cache))]
    cache.restore(tensors["ids"].tolist(), states, json.loads(own["regime"]))
    if not return_metadata:
        return cache
    hidden = {"format", _FORMAT}
    rest = {k: v for k, v in header.metadata.items() if k not in hidden and not k.startswith(_OWN)}
    return cache, rest


def _check_savable(cache: PromptCache) -> None:
    if not isinstance(cache, PromptCache):
        raise RequestError(f"a {type(cache).__name__} cannot be saved; only a cache of model.make_cache() can")
    if not cache.is_trimmable():
        raise RequestError(
            "the cache cannot be saved: it has forgotten its oldest tokens, so no prompt could be held against it; "
            "leave max_kv_size out, or make it larger"
        )
    rows, known = cache.ids.shape
    if not cache.offset:
        raise RequestError("the cache cannot be saved: it has 0 tokens; prefill a prompt first")
    if rows != 1:
        raise RequestError(f"the cache cannot be saved: it holds {rows} sequences; a file holds 1, so save one by one")
    if known != cache.offset:
        raise RequestError(
            f"the cache cannot be saved: it knows the ids of {known} of its {cache.offset} tokens; fill it with the "
            "model itself"
        )


def _check_metadata(metadata: Mapping[str, str]) -> None:
    for name, value in metadata.items():
        try:
            (name + value).encode()
        except (TypeError, AttributeError, UnicodeEncodeError):
            raise RequestError(f"the metadata {name!r:.60}: {value!r:.60} must be two texts in UTF-8") from None
        if name == "format" or name.startswith("phi4_mlx"):
            raise RequestError(f"the metadata cannot have the name {name!r:.60}, which the format uses; take another")


def _names(layer: int, bits: int | None) -> list[str]:
    return [f"layers.{layer}.{part}" for part in (_PLAIN if bits is None else _QUANTISED)]


def _shape(cache: PromptCache) -> dict[str, str]:
    """What a cache must be made like to go on from the arrays, as JSON values."""
    first = cache[0]
    return {
        name: json.dumps(value)
        for name, value in (
            ("regime", cache.regime),
            ("pinned", cache.pinned),
            ("kv_bits", first.bits),
            ("max_kv_size", first.max_size),
            ("num_layers", len(cache)),
        )
    }


def _identity(model: Model, tokenizer: Tokenizer) -> dict[str, str]:
    """What the numbers hang on."""
    return {
        "model": base_fingerprint(model),
        "adapter": adapter_fingerprint(model),
        "tokenizer": tokenizer.fingerprint()[:32],
    }


def _read_header(path: Path) -> Header:
    header = read_whole_header(path, _MAKE_ANEW)
    version = header.metadata.get(_FORMAT)
    if version is None:
        raise CheckpointError(f"{path} is no prompt cache of phi4_mlx; {_MAKE_ANEW}")
    if version != _VERSION:
        raise CheckpointError(f"{path} has the format {version!r:.20}, and only {_VERSION} is known; {_MAKE_ANEW}")
    return header


def _read_tensors(path: Path, header: Header) -> dict[str, mx.array]:
    """The tensors in the order in which they were written, once they are what was written."""
    names: Sequence[str] = sorted(header.tensors, key=lambda name: header.tensors[name].start)
    try:
        loaded = mx.load(str(path), format="safetensors")
        tensors = {name: loaded[name] for name in names if name != "checksum"}
        whole = bytes(memoryview(loaded["checksum"])) == checksum(header.raw, tensors.values())
    except (KeyError, RuntimeError, ValueError):  # mlx raises the latter two on a file that has changed by now
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is damaged: its checksum is wrong; {_MAKE_ANEW}")
    return tensors


def _refuse(path: Path, what: str, without: bool, wanted_without: bool) -> NoReturn:
    named = {"adapter": "without an adapter" if without else "with an adapter" if wanted_without else ""}
    made = named.get(what) or f"with another {what}"
    raise CheckpointError(f"{path} was made {made}, and fits nothing else; give it the same {what}, or {_MAKE_ANEW}")

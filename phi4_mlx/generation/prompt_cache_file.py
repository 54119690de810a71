"""Prompt caches as files, so that a long prefill is computed once.

A safetensors file: the ids, the arrays of each layer, and last the SHA-256 of all that precedes it. Its metadata holds
the fingerprints of the model, the adapter and the tokenizer, and the RoPE table; a cache that was made with any other
is refused. Content is checked against the model too, since anybody can compute a checksum. Of a medium the file has
kind, place and SHA-256, and its keys and values among the others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, overload

import mlx.core as mx

from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.atomic import replacing
from phi4_mlx.files.dtypes import name_of
from phi4_mlx.files.manifest import file_sha256
from phi4_mlx.files.safetensors import Header, TensorWriter, read_whole_header
from phi4_mlx.fingerprint import WITHOUT, adapter_fingerprint, base_fingerprint, named_fingerprint
from phi4_mlx.models.cached_tokens import conditions_of
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.terminal.amount import amount
from phi4_mlx.tokens.prompt import AbsentMedium, Place, Prompt

_FORMAT, _VERSION, _WITH_MEDIA = "phi4_mlx_prompt_cache", "2", "3"
_OWN = "phi4_mlx."  # prefix of our own metadata
_MAKE_ONE = "make one with cache-prompt or save_prompt_cache"
_CHECKSUM = ("U8", (32,))


class Tokenizer(Protocol):
    """The part of a tokenizer that is used here."""

    def fingerprint(self) -> str: ...


def save_prompt_cache(
    path: str | Path,
    cache: PromptCache,
    model: LanguageModel,
    tokenizer: Tokenizer,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes a prompt cache to a file, readable by its owner only; an existing file is replaced.

    Args:
        path: the file; it is complete or absent.
        cache: from `model.make_cache()`, with a prompt in it; B must be 1.
        model: the model that filled it, with the same adapter.
        tokenizer: the tokenizer that encoded the ids.
        metadata: further texts by name for the file; names may not start with "phi4_mlx".

    Returns:
        The size of the file in bytes.

    Raises:
        RequestError: the cache is empty, has dropped tokens, has several sequences, or does not know its ids; the
            metadata are not texts by name; the path exists and is not a regular file.
        OSError: the file cannot be written; an older one is still there.
    """
    path = Path(os.path.expanduser(path))
    _check_savable(cache)
    _check_metadata(metadata or {})
    tensors = {"ids": cache.ids[0].astype(mx.int32)}
    for names, layer in zip(_names(cache), cache, strict=True):
        tensors |= zip(names, layer.state, strict=True)
    own = {**_identity(model, tokenizer, cache.adapter), **_shape(cache)}
    if cache.adapter and not cache.places:
        own["named_adapter"] = cache.adapter
    if cache.places:
        own["media"] = json.dumps([_described(place) for place in cache.places])
    version = _WITH_MEDIA if cache.places else _VERSION
    about = {_FORMAT: version, **(metadata or {}), **{f"{_OWN}{name}": value for name, value in own.items()}}
    layout = {name: (name_of(array.dtype), array.shape) for name, array in tensors.items()}
    with replacing(path) as partial:
        with TensorWriter(partial, layout | {"checksum": _CHECKSUM}, about) as writer:
            os.chmod(partial, 0o600)
            digest = hashlib.sha256(writer.header)
            for name, array in tensors.items():
                data = memoryview(mx.contiguous(array).view(mx.uint8))
                digest.update(data.cast("B"))
                writer.write(name, [data])
            writer.write("checksum", [digest.digest()])
        size = partial.stat().st_size
    return size


@overload
def load_prompt_cache(path: str | Path, model: LanguageModel, tokenizer: Tokenizer) -> PromptCache: ...


@overload
def load_prompt_cache(
    path: str | Path, model: LanguageModel, tokenizer: Tokenizer, return_metadata: Literal[True]
) -> tuple[PromptCache, dict[str, str]]: ...


def load_prompt_cache(
    path: str | Path, model: LanguageModel, tokenizer: Tokenizer, return_metadata: bool = False
) -> PromptCache | tuple[PromptCache, dict[str, str]]:
    """Reads a prompt cache, which continues exactly as the saved one would.

    A cache with media continues without them. Where it runs again from its start, as at the RoPE boundary, it needs
    them: `cache.reuse(prompt)` of a prompt that has them hands them over.

    Args:
        path: a file of `save_prompt_cache`.
        model: the model that filled it, with the same adapter; lazy weights are read for their hash.
        tokenizer: the tokenizer that encoded its ids.
        return_metadata: return the caller's metadata too.

    Returns:
        The cache; `cache.reuse(ids)` returns the ids of a whole prompt that are still to prefill. With
        `return_metadata`, (cache, metadata).

    Raises:
        CheckpointError: the file is missing, damaged or not a prompt cache, or it was made with another model, adapter
            or tokenizer, or its content does not fit the model.
    """
    path = Path(os.path.expanduser(path))
    header = _read_header(path)
    own = {name.removeprefix(_OWN): value for name, value in header.metadata.items() if name.startswith(_OWN)}
    tensors = _read_tensors(path, header)
    try:
        places = [_place(each) for each in json.loads(own.get("media", "[]"))]
        named = own.get("named_adapter")
        adapter = conditions_of(places, "short", named, model.make_cache().mode_adapters).adapter
        for what, wanted in _identity(model, tokenizer, adapter).items():
            if own.get(what) != wanted:
                _refuse(path, what, own.get(what) == WITHOUT, wanted == WITHOUT)
        cache = _restored(model, own, tensors, places)
    except (KeyError, ValueError, TypeError, RecursionError, RequestError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is not a prompt cache of this model: {reason:.200}; {_MAKE_ONE}") from None
    if not return_metadata:
        return cache
    hidden = {"format", _FORMAT}
    rest = {k: v for k, v in header.metadata.items() if k not in hidden and not k.startswith(_OWN)}
    return cache, rest


def _check_savable(cache: PromptCache) -> None:
    if not isinstance(cache, PromptCache):
        raise RequestError(f"a {type(cache).__name__} cannot be saved; only a cache of model.make_cache() can")
    if not cache.is_trimmable() and not cache.needs_snapshots:
        raise RequestError(
            "the cache cannot be saved: it has dropped its oldest tokens, so no prompt could be compared with it; "
            "leave max_kv_size out, or make it larger"
        )
    rows, known = cache.ids.shape
    if not cache.offset:
        raise RequestError("the cache cannot be saved: it has 0 tokens; prefill a prompt first")
    if rows != 1:
        raise RequestError(f"the cache cannot be saved: it has {rows} sequences; a file holds 1, so save each alone")
    if known != cache.offset:
        raise RequestError(
            f"the cache cannot be saved: it does not know the ids of all its tokens, only of {known} of "
            f"{cache.offset}; fill it with the model itself"
        )


def _check_metadata(metadata: Mapping[str, str]) -> None:
    for name, value in metadata.items():
        try:
            (name + value).encode()
        except (TypeError, AttributeError, UnicodeEncodeError):
            raise RequestError(f"the metadata {name!r:.60}: {value!r:.60} must be two texts in UTF-8") from None
        if name == "format" or name.startswith("phi4_mlx"):
            raise RequestError(f"the metadata name {name!r:.60} is reserved by the format; choose another")


def _names(cache: PromptCache) -> list[list[str]]:
    """The names of each layer's arrays in the file."""
    return [[f"layers.{number}.{name}" for name in layer.state_names] for number, layer in enumerate(cache)]


def _shape(cache: PromptCache) -> dict[str, str]:
    """The options that a cache for these arrays is made with, as JSON values."""
    return {
        name: json.dumps(value)
        for name, value in (
            ("regime", cache.regime),
            ("pinned", cache.options.regime),
            ("kv_bits", cache.options.kv_bits),
            ("max_kv_size", cache.options.max_kv_size),
            ("num_layers", len(cache)),
        )
    }


def _described(place: Place) -> list[Any]:
    """A run of slots as a JSON value."""
    medium = place.medium
    return [place.start, place.skipped, place.count, medium.kind, medium.tokens, medium.digest]


def _place(described: Any) -> Place:
    """The run of slots of a JSON value; TypeError or ValueError if it is none."""
    start, skipped, count, kind, tokens, digest = described
    numbers = all(type(each) is int for each in (start, skipped, count, tokens))
    if not numbers or not (start >= 0 and 0 <= skipped < skipped + count <= tokens) or kind not in ("image", "audio"):
        raise ValueError(f"{described!r:.100} is not a place of a medium")
    if len(bytes.fromhex(digest)) != 32:
        raise ValueError(f"{digest!r:.100} is not a SHA-256")
    return Place(start, AbsentMedium(kind, tokens, digest), skipped, count)


def _identity(model: LanguageModel, tokenizer: Tokenizer, adapter: str | None) -> dict[str, str]:
    """The fingerprints that the cached numbers depend on; `adapter` is the one in use by its name."""
    return {
        "model": base_fingerprint(model),
        "adapter": adapter_fingerprint(model) if adapter is None else named_fingerprint(model, adapter),
        "tokenizer": tokenizer.fingerprint()[:32],
    }


def _read_header(path: Path) -> Header:
    header = read_whole_header(path, _MAKE_ONE, "prompt cache file")
    version = header.metadata.get(_FORMAT)
    if version is None:
        raise CheckpointError(f"{path} is not a prompt cache file; {_MAKE_ONE}")
    if version not in (_VERSION, _WITH_MEDIA):
        supported = f"{_VERSION} and {_WITH_MEDIA} are supported"
        raise CheckpointError(f"{path} has format {version!r:.20}; only {supported}; {_MAKE_ONE}")
    return header


def _read_tensors(path: Path, header: Header) -> dict[str, mx.array]:
    """The tensors in the order they were written, checked against the checksum."""
    names: Sequence[str] = sorted(header.tensors, key=lambda name: header.tensors[name].start)
    whole = False
    try:
        if names and names[-1] == "checksum":
            loaded = mx.load(str(path), format="safetensors")
            expected = bytes(memoryview(loaded["checksum"])).hex()
            whole = file_sha256(path, header.tensors["checksum"].start) == expected
    except (KeyError, RuntimeError, ValueError, OSError):  # MLX raises some of them if the file has changed meanwhile
        pass
    if not whole:
        raise CheckpointError(f"{path} is damaged: its checksum is wrong; {_MAKE_ONE}")
    return {name: loaded[name] for name in names[:-1]}


def _restored(
    model: LanguageModel, own: Mapping[str, str], tensors: dict[str, mx.array], places: Sequence[Place]
) -> PromptCache:
    """A cache with the content of a file, checked against a cache that the model fills itself.

    Raises:
        KeyError, ValueError, RecursionError, RequestError: something is missing or does not fit.
    """
    pinned, kv_bits, max_kv_size, regime = (json.loads(own[n]) for n in ("pinned", "kv_bits", "max_kv_size", "regime"))
    cache = model.make_cache(pinned, kv_bits, max_kv_size)
    ids = tensors["ids"]
    if ids.dtype != mx.int32 or ids.ndim != 1:
        raise ValueError(f"ids are {ids.dtype} of shape {list(ids.shape)}")
    prompt = Prompt(ids.tolist(), places)
    model.check_ids(prompt)
    ends = [0, *(place.end for place in places)]
    if any(end > start for end, start in zip(ends, [*(place.start for place in places), ids.size], strict=True)):
        raise ValueError("its media overlap, or reach past its end")
    if regime not in ("short", "long") or (model.regime(ids.size), regime) == ("long", "short"):
        raise ValueError(f"{amount(ids.size, 'token')} cannot be under the RoPE table {regime!r:.20}")
    if regime != (pinned or regime) or ids.size > (max_kv_size or ids.size):
        count = amount(ids.size, "token")
        raise ValueError(f"its options do not allow {count} under the RoPE table {regime}")
    expected = _layout(model, cache, ids.size)
    if left_over := sorted(tensors.keys() - expected.keys() - {"ids"}):
        raise ValueError(f"{left_over[0]!r:.60} is left over")
    for name, kind in expected.items():
        array = tensors[name]
        if (array.dtype, array.shape) != kind:
            raise ValueError(f"{name} is {array.dtype} of shape {list(array.shape)}, not {kind[0]} of {list(kind[1])}")
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all():
            raise ValueError(f"{name} contains NaN or inf")
    states = [[tensors[name] for name in names] for names in _names(cache)]
    cache.restore(prompt, states, regime, own.get("named_adapter"))
    if cache.offset != ids.size:
        raise ValueError(f"its layers hold {amount(cache.offset, 'token')}, and it has {amount(ids.size, 'id')}")
    return cache


def _layout(model: LanguageModel, cache: PromptCache, length: int) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
    """dtype and shape of each array of a cache of `length` tokens, from two caches of few tokens; computes nothing."""
    options = cache.options
    states = []
    for few in (2, 3):
        probe = model.make_cache(options.regime, options.kv_bits, options.max_kv_size)
        model(mx.zeros((1, few), mx.int32), probe)
        states.append([(layer.kept(length), array) for layer in probe for array in layer.state])
    names = [name for layer in _names(cache) for name in layer]
    return {
        name: (two.dtype, tuple(kept if a != b else a for a, b in zip(two.shape, three.shape, strict=True)))
        for name, (kept, two), (_, three) in zip(names, *states, strict=True)
    }


def _refuse(path: Path, what: str, without: bool, wanted_without: bool) -> NoReturn:
    named = {"adapter": "without an adapter" if without else "with an adapter" if wanted_without else ""}
    made = named.get(what) or f"with another {what}"
    raise CheckpointError(f"{path} was made {made}, and fits no other; use the same {what}, or {_MAKE_ONE}")

"""The content of a prompt cache file: arrays and metadata of a cache, and a cache made of them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import mlx.core as mx

from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.atomic import replacing
from phi4_mlx.files.dtypes import name_of
from phi4_mlx.files.safetensors import Header, TensorWriter, read_whole_header
from phi4_mlx.fingerprint import WITHOUT, adapter_fingerprint, base_fingerprint, named_fingerprint
from phi4_mlx.models.cache import CacheOptions, LayerCache
from phi4_mlx.models.cached_tokens import conditions_of
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.rope import Regime
from phi4_mlx.models.snapshot import MAX_SNAPSHOTS, Snapshot
from phi4_mlx.terminal.amount import amount
from phi4_mlx.tokens.prompt import AbsentMedium, Place, Prompt

FORMAT = "phi4_mlx_prompt_cache"  # the metadata that has the version
VERSIONS = _PLAIN, _WITH_MEDIA, _WITH_SNAPSHOTS = ("2", "3", "4")
_OWN = "phi4_mlx."  # prefix of our own metadata
MAKE_ONE = "make one with cache-prompt or save_prompt_cache"
CHECKSUM = ("U8", (32,))

Identify = Callable[[str | None], Mapping[str, str]]  # the adapter's name -> the fingerprints, as `identity` has them


class Tokenizer(Protocol):
    """The part of a tokenizer that is used here."""

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Content:
    """The content of a file.

    Attributes:
        own: our own metadata, without their prefix.
        metadata: the caller's.
        tensors: name -> array, in the order of the file; the ids come first.
    """

    own: dict[str, str]
    metadata: Mapping[str, str]
    tensors: dict[str, mx.array]

    @property
    def layout(self) -> dict[str, tuple[str, Sequence[int]]]:
        """dtype and shape of each tensor, for a header."""
        return {name: (name_of(each.dtype), each.shape) for name, each in self.tensors.items()} | {"checksum": CHECKSUM}

    @property
    def about(self) -> dict[str, str]:
        """All metadata, as they stand in the header."""
        version = _WITH_SNAPSHOTS if "snapshots" in self.own else _WITH_MEDIA if "media" in self.own else _PLAIN
        return {FORMAT: version, **self.metadata, **{f"{_OWN}{name}": value for name, value in self.own.items()}}


def content_of(cache: PromptCache, fingerprints: Mapping[str, str], metadata: Mapping[str, str]) -> Content:
    """The content of a file of a cache with one sequence, which knows the ids of all its tokens.

    Args:
        cache: the cache.
        fingerprints: from `identity`.
        metadata: further texts by name.
    """
    tensors = {"ids": cache.ids[0].astype(mx.int32)}
    for names, layer in zip(_names(cache), cache, strict=True):
        tensors |= zip(names, layer.state, strict=True)
    own = {**fingerprints, **shape(cache.options, cache.regime, len(cache))}
    if cache.adapter and not cache.places:
        own["named_adapter"] = cache.adapter
    if cache.places:
        own["media"] = json.dumps([_described(place) for place in cache.places])
    if cache.needs_snapshots:
        own["snapshots"] = json.dumps([each.length for each in cache.snapshots])
        for each in cache.snapshots:
            twin = cache.fork(each.length)
            for names, layer in zip(_snapshot_names(twin, each.length), twin, strict=True):
                if names:
                    tensors |= zip(names, layer.state, strict=True)
    return Content(own, metadata, tensors)


def memory_of(array: mx.array) -> memoryview:
    """The bytes of an array; computes it, and copies it only if it is a slice."""
    return memoryview(mx.contiguous(array).view(mx.uint8)).cast("B")


def write_content(
    path: Path, layout: Mapping[str, tuple[str, Sequence[int]]], about: Mapping[str, str], buffers: Iterable[memoryview]
) -> int:
    """Writes a file whole or not at all, readable by its owner only; returns its size in bytes.

    Args:
        path: the file.
        layout: `Content.layout`.
        about: `Content.about`.
        buffers: the bytes of each tensor, without the checksum.

    Raises:
        RequestError: the path exists and is not a regular file.
        OSError: the file cannot be written; an older one is still there.
    """
    with replacing(path) as partial:
        with TensorWriter(partial, layout, about) as writer:
            os.chmod(partial, 0o600)
            digest = hashlib.sha256(writer.header)
            for name, data in zip(layout, buffers, strict=False):
                digest.update(data)
                writer.write(name, [data])
            writer.write("checksum", [digest.digest()])
        size = partial.stat().st_size
    return size


def cache_of(
    path: Path, model: LanguageModel, identify: Identify, own: Mapping[str, str], tensors: dict[str, mx.array]
) -> PromptCache:
    """A cache with the content of a file, checked against the model.

    Args:
        path: the file, for messages.
        model: the model that filled it, with the same adapter.
        identify: returns what the file's fingerprints must be.
        own: `own_metadata` of its header.
        tensors: its arrays without the checksum, which was right.

    Raises:
        CheckpointError: it was made with another model, adapter or tokenizer, or does not fit the model.
    """
    try:
        places = places_in(own)
        named = own.get("named_adapter")
        adapter = conditions_of(places, "short", named, model.make_cache().mode_adapters).adapter
        for what, wanted in identify(adapter).items():
            if own.get(what) != wanted:
                _refuse(path, what, own.get(what) == WITHOUT, wanted == WITHOUT)
        return _restored(model, own, tensors, places)
    except (KeyError, ValueError, TypeError, RecursionError, RequestError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is not a prompt cache of this model: {reason:.200}; {MAKE_ONE}") from None


def own_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Our own metadata of a file, without their prefix, from all in its header."""
    return {name.removeprefix(_OWN): value for name, value in metadata.items() if name.startswith(_OWN)}


def caller_metadata(header: Header) -> dict[str, str]:
    """The caller's metadata of a file."""
    hidden = {"format", FORMAT}
    return {name: value for name, value in header.metadata.items() if name not in hidden and not name.startswith(_OWN)}


def places_in(own: Mapping[str, str]) -> list[Place]:
    """The media of a file.

    Raises:
        ValueError, TypeError, RecursionError: their description is damaged.
    """
    return [_place(each) for each in json.loads(own.get("media", "[]"))]


def snapshots_in(own: Mapping[str, str]) -> list[int]:
    """The lengths of the snapshots in a file, in order.

    Raises:
        ValueError, RecursionError: their description is damaged.
    """
    lengths: list[int] = json.loads(own.get("snapshots", "[]"))
    whole = isinstance(lengths, list) and all(type(each) is int and each > 0 for each in lengths)
    if not whole or len(lengths) > MAX_SNAPSHOTS or sorted(set(lengths)) != lengths:
        raise ValueError(f"{lengths!r:.100} are not the lengths of at most {MAX_SNAPSHOTS} snapshots")
    return lengths


def _names(cache: PromptCache) -> list[list[str]]:
    """The names of each layer's arrays in the file."""
    return [[f"layers.{number}.{name}" for name in layer.state_names] for number, layer in enumerate(cache)]


def _snapshot_names(cache: PromptCache, length: int) -> list[list[str]]:
    """The names of each layer's arrays in a snapshot; none of a layer that can be trimmed."""
    return [
        [] if layer.is_trimmable() else [f"layers.{number}.snapshots.{length}.{name}" for name in layer.state_names]
        for number, layer in enumerate(cache)
    ]


def shape(options: CacheOptions, regime: Regime, num_layers: int) -> dict[str, str]:
    """What a cache was made with and computed under, beside the fingerprints, as JSON values."""
    values = {
        "regime": regime,
        "pinned": options.regime,
        "kv_bits": options.kv_bits,
        "max_kv_size": options.max_kv_size,
        "num_layers": num_layers,
    }
    return {name: json.dumps(value) for name, value in values.items()}


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


def identity(model: LanguageModel, tokenizer: Tokenizer, adapter: str | None) -> dict[str, str]:
    """The fingerprints that the cached numbers depend on; `adapter` is the one in use by its name."""
    return {
        "model": base_fingerprint(model),
        "adapter": adapter_fingerprint(model) if adapter is None else named_fingerprint(model, adapter),
        "tokenizer": tokenizer.fingerprint()[:32],
    }


def read_cache_header(path: Path) -> Header:
    """The header of a prompt cache file.

    Raises:
        CheckpointError: it is missing, damaged, of another format or of another version.
    """
    header = read_whole_header(path, MAKE_ONE, "prompt cache file")
    version = header.metadata.get(FORMAT)
    if version is None:
        raise CheckpointError(f"{path} is not a prompt cache file; {MAKE_ONE}")
    if version not in VERSIONS:
        supported = f"{', '.join(VERSIONS[:-1])} and {VERSIONS[-1]} are supported"
        raise CheckpointError(f"{path} has format {version!r:.20}; only {supported}; {MAKE_ONE}")
    return header


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
    lengths = snapshots_in(own)
    expected, *at_snapshots = _layouts(model, cache, [ids.size, *lengths])
    for length, layout in zip(lengths, at_snapshots, strict=True):
        for layer, names in zip(_names(cache), _snapshot_names(cache, length), strict=True):
            expected |= {name: layout[own_name] for own_name, name in zip(layer, names, strict=False)}
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
    if any(length > ids.size for length in lengths):
        raise ValueError(f"it has a snapshot after {amount(lengths[-1], 'token')} of {ids.size}")
    cache.snapshots.add([_snapshot(model, cache, length, tensors) for length in lengths])
    return cache


def _snapshot(model: LanguageModel, cache: PromptCache, length: int, tensors: Mapping[str, mx.array]) -> Snapshot:
    """A snapshot from the arrays of a file.

    Raises:
        ValueError: its layers hold another number of tokens.
    """
    layers: list[LayerCache] = []
    probe = model.make_cache(**vars(cache.options))
    for layer, empty, names in zip(cache, probe, _snapshot_names(cache, length), strict=True):
        if names:
            empty.state = [tensors[name] for name in names]
        layers.append(empty if names else layer.fork(length))
    if any(layer.offset != length for layer in layers):
        raise ValueError(f"its snapshot after {amount(length, 'token')} holds another number of them")
    return Snapshot(length, [layer.snapshot() for layer in layers])


def _layouts(
    model: LanguageModel, cache: PromptCache, lengths: Sequence[int]
) -> list[dict[str, tuple[mx.Dtype, tuple[int, ...]]]]:
    """dtype and shape of each array of caches of some lengths, from two caches of few tokens; computes nothing."""
    probes = []
    for few in (2, 3):
        probe = model.make_cache(**vars(cache.options))
        model(mx.zeros((1, few), mx.int32), probe)
        probes.append([(layer, array) for layer in probe for array in layer.state])
    names = [name for layer in _names(cache) for name in layer]
    return [
        {
            name: (
                two.dtype,
                tuple(layer.kept(length) if a != b else a for a, b in zip(two.shape, three.shape, strict=True)),
            )
            for name, (layer, two), (_, three) in zip(names, *probes, strict=True)
        }
        for length in lengths
    ]


def _refuse(path: Path, what: str, without: bool, wanted_without: bool) -> NoReturn:
    named = {"adapter": "without an adapter" if without else "with an adapter" if wanted_without else ""}
    made = named.get(what) or f"with another {what}"
    raise CheckpointError(f"{path} was made {made}, and fits no other; use the same {what}, or {MAKE_ONE}")

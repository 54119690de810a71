"""Prompt caches as files, so that a long prefill is computed once.

A safetensors file: the ids, the arrays of each layer, and last the SHA-256 of all that precedes it. Its metadata holds
the fingerprints of the model, the adapter and the tokenizer, and the RoPE table; a cache that was made with any other
is refused. Content is checked against the model too, since anybody can compute a checksum. Of a medium the file has
kind, place and SHA-256, and its keys and values among the others. Of a model whose tokens cannot be trimmed it has the
snapshots too, so that a prompt may diverge from it there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

import mlx.core as mx

from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.manifest import file_sha256
from phi4_mlx.files.safetensors import Header
from phi4_mlx.generation.prompt_cache_content import (
    MAKE_ONE,
    Tokenizer,
    cache_of,
    caller_metadata,
    content_of,
    identity,
    memory_of,
    own_metadata,
    read_cache_header,
    write_content,
)
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache


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
    content = content_of(cache, identity(model, tokenizer, cache.adapter), metadata or {})
    return write_content(path, content.layout, content.about, map(memory_of, content.tensors.values()))


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
    header = read_cache_header(path)
    own = own_metadata(header.metadata)
    tensors = _read_tensors(path, header)
    cache = cache_of(path, model, lambda adapter: identity(model, tokenizer, adapter), own, tensors)
    if not return_metadata:
        return cache
    return cache, caller_metadata(header)


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
        raise CheckpointError(f"{path} is damaged: its checksum is wrong; {MAKE_ONE}")
    return {name: loaded[name] for name in names[:-1]}

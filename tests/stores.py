"""Cache stores of tiny models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from phi4_mlx.generation.cache_store.folder import StoreFolder, private_folder
from phi4_mlx.generation.cache_store.store import CacheStore
from phi4_mlx.models.cache import CacheOptions
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from tests.char_tokenizer import CharTokenizer
from tests.model_runs import decoded

TOKENIZER = CharTokenizer()
SOON_S = 30.0  # a write that takes longer is stuck


@contextlib.contextmanager
def opened(
    folder: Path,
    model: LanguageModel,
    limit_bytes: int = 2**30,
    warn: Callable[[str], None] = lambda line: None,
    tokenizer: Any = TOKENIZER,
) -> Iterator[CacheStore]:
    """A store, closed at the end."""
    store = CacheStore(StoreFolder(private_folder(folder), limit_bytes), model, tokenizer, warn)
    try:
        yield store
    finally:
        assert store.close(SOON_S)


def prefilled(model: LanguageModel, ids: list[int], adapter: str | None = None, **options: Any) -> PromptCache:
    """A cache of a prompt, in chunks of 20, as compact as the prefix cache keeps it."""
    cache = model.make_cache(**options)
    cache.adapter = adapter
    decoded(model, ids, 1, cache=cache, prefill_step_size=20)
    cache.forget_media()
    cache.compact()
    return cache


def keep(folder: Path, model: LanguageModel, ids: list[int], adapter: str | None = None, **options: Any) -> PromptCache:
    """Stores the cache of a prompt, and returns it."""
    cache = prefilled(model, ids, adapter, **options)
    with opened(folder, model) as store:
        store.offer(model, cache)
    return cache


def found(folder: Path, model: LanguageModel, ids: list[int], adapter: str | None = None, **options: Any) -> int:
    """Tokens of a prompt that a store opened anew would serve."""
    tokenizer = options.pop("tokenizer", TOKENIZER)
    with opened(folder, model, tokenizer=tokenizer) as store:
        best = store.find(model, ids, adapter, CacheOptions(**options))
        return 0 if best is None else best.length


def next_logits(model: LanguageModel, cache: PromptCache, ids: list[int]) -> mx.array:
    """The logits [V] after a prompt of which a cache has the beginning."""
    return model(mx.array([ids[cache.offset :]]), cache)[0, -1]


def files(folder: Path) -> list[Path]:
    """The files of a store, in order of their names."""
    return sorted(folder.iterdir())


def size_of(folder: Path) -> int:
    """Bytes of everything in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())

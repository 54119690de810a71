"""The prompt caches of conversations in a store, where the next chat finds them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phi4_mlx.generation.cache_store.store import CacheStore
    from phi4_mlx.models.model import LanguageModel
    from phi4_mlx.models.prompt_cache import PromptCache
    from phi4_mlx.tokens.tokenizer import Tokenizer

STORING_S = 10.0  # for the prompt cache to be stored, at the end


class StoredCaches:
    """A store, or none: then nothing is found and nothing kept.

    Args:
        store: of the model of the conversation; None for none.

    Attributes:
        store: as given, or after `switch` that of the other model.
    """

    def __init__(self, store: CacheStore | None = None) -> None:
        self.store = store

    def recalled(self, model: LanguageModel, cache: PromptCache, prompt: Sequence[int]) -> PromptCache:
        """A stored cache of a prompt's beginning, if it has enough more of it than `cache`; else `cache`."""
        if self.store is None:
            return cache
        regime = cache.options.regime or model.regime(len(prompt))
        known = cache.shared_with(prompt[:-1]) if cache.regime == regime else 0
        found = self.store.find(model, prompt, None, cache.options, beyond=known)
        return (None if found is None else self.store.load(found, model, prompt)) or cache

    def keep(self, model: LanguageModel, cache: PromptCache, leaving: bool = False) -> None:
        """Has a cache written, unless it has dropped tokens; a failure costs a prefill.

        Args:
            model: the model that filled it.
            cache: it may change afterwards.
            leaving: as for `CacheStore.offer`.
        """
        if self.store is not None and cache.offset and (cache.is_trimmable() or cache.needs_snapshots):
            with contextlib.suppress(Exception):
                self.store.offer(model, cache, leaving)

    def close(self, model: LanguageModel, cache: PromptCache) -> None:
        """Stores the last cache."""
        self.keep(model, cache, leaving=True)
        if self.store is not None:
            self.store.close(STORING_S)

    def switch(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        """Goes on with another model, after `close`."""
        self.store = None if self.store is None else self.store.reopened(model, tokenizer)

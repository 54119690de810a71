"""The caches of a follower are those of the leader, whatever is done to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4_mlx.models.model import LanguageModel
from phi4_mlx.ranks.leader import LedBatchCache, LedPromptCache
from tests.conftest import make_tiny_model
from tests.kinds import MAKERS
from tests.media import clip, picture, prompt_of
from tests.mirrored import Pair

KINDS: dict[str, tuple[Callable[[], LanguageModel], dict[str, Any]]] = {
    **{kind: (make, {}) for kind, make in MAKERS.items()},
    "4-bit cache": (lambda: make_tiny_model(num_attention_heads=3, num_key_value_heads=1), {"kv_bits": 4}),
    "8-bit cache": (lambda: make_tiny_model(num_attention_heads=3, num_key_value_heads=1), {"kv_bits": 8}),
    "limited cache": (make_tiny_model, {"max_kv_size": 512}),
}


class Doings:
    """Random operations on the caches of a pair, as generation does them."""

    def __init__(self, pair: Pair, options: dict[str, Any], data: st.DataObject) -> None:
        self.pair, self.options, self.data = pair, options, data
        self.caches: list[LedPromptCache] = []
        self.batches: list[LedBatchCache] = []

    def number(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def cache(self) -> LedPromptCache:
        if not self.caches:
            self.make()
        return self.caches[self.number(0, len(self.caches) - 1)]  # hypothesis keeps what it draws

    def make(self) -> None:
        cache = self.pair.model.make_cache(**self.options)
        assert isinstance(cache, LedPromptCache)
        self.caches.append(cache)
        self.read(cache)

    def read(self, cache: LedPromptCache | None = None) -> None:
        """Tokens that follow, in chunks; a few may cross the RoPE boundary."""
        cache = self.cache() if cache is None else cache
        longest = 300 if cache.options.max_kv_size else 40
        ids = [self.number(0, 500) for _ in range(self.number(1, 3))] * self.number(1, longest // 3)
        run = cache.admit(mx.array([ids]))
        for start in range(0, run.shape[1], 24):
            self.pair.model.hidden(run[:, start : start + 24], cache, rows=1)

    def read_media(self) -> None:
        if self.pair.model.slot_ids:
            cache = self.cache()
            prompt = prompt_of([3, 5], self.data.draw(st.sampled_from([picture(), clip()])), [7])
            self.pair.model(mx.array([prompt]), cache, prompt.media)

    def trim(self) -> None:
        cache = self.cache()
        cache.trim(self.number(0, cache.offset))

    def mark(self) -> None:
        self.cache().mark()

    def truncate(self) -> None:
        cache = self.cache()
        cache.truncate(cache.reusable(self.number(0, cache.offset)))

    def fork(self) -> None:
        cache = self.cache()
        twin = cache.fork(cache.reusable(self.number(0, cache.offset)))
        assert isinstance(twin, LedPromptCache)
        if twin.offset:
            self.caches.append(twin)

    def compact(self) -> None:
        self.cache().compact()

    def forget(self) -> None:
        self.caches.remove(self.cache())

    def join(self) -> None:
        """Rows for caches of one RoPE table, in a new batch or one that is there."""
        plain = [each for each in self.caches if each.offset and each.options.max_kv_size is None]
        fitting = [batch for batch in self.batches if batch.regime == plain[0].regime] if plain else []
        if plain:
            made = self.pair.model.make_batch_cache(plain[0].regime, self.options.get("kv_bits"))
            batch = fitting[0] if fitting else made
            assert isinstance(batch, LedBatchCache)
            self.batches += [] if fitting else [batch]
            batch.join([each for each in plain if each.regime == batch.regime][:3])

    def batch(self) -> LedBatchCache | None:
        return self.batches[self.number(0, len(self.batches) - 1)] if self.batches else None

    def step(self) -> None:
        if (batch := self.batch()) is not None and batch.lengths:
            width = self.number(1, 4) if batch.rewindable else 1
            self.pair.model(mx.array([[self.number(0, 500)] * width for _ in batch.lengths]), batch)
            if width > 1:
                batch.take_back([self.number(0, width - 1) for _ in batch.lengths])

    def keep(self) -> None:
        if (batch := self.batch()) is not None and batch.lengths:
            kept = self.data.draw(st.lists(st.integers(0, len(batch.lengths) - 1), unique=True, min_size=1))
            batch.keep(kept)

    def copy_row(self) -> None:
        if (batch := self.batch()) is not None and batch.lengths:
            row = self.number(0, len(batch.lengths) - 1)
            empty = self.pair.model.make_cache(**self.options)
            copied = batch.copy_row(row, [0] * (batch.lengths[row] + 2), empty)
            assert isinstance(copied, LedPromptCache)
            self.caches.append(copied)

    def leave(self) -> None:
        if (batch := self.batch()) is not None:
            self.batches.remove(batch)


NAMES = [name for name in vars(Doings) if name[0] != "_" and name not in ("number", "cache", "batch")]


BEGINNINGS = (["make", "mark", "read", "truncate"], ["make", "make", "join", "step", "copy_row"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(data=st.data())
def test_any_operations_leave_both_with_the_same_arrays(kind: str, data: st.DataObject) -> None:
    make, options = KINDS[kind]
    doings = Doings(Pair(make), options, data)
    beginning = data.draw(st.sampled_from(BEGINNINGS))
    for name in [*beginning, *data.draw(st.lists(st.sampled_from(NAMES), min_size=4, max_size=12))]:
        getattr(doings, name)()
    doings.pair.check([*doings.caches, *doings.batches])

"""Recurrent states and windows: each keeps what a plain list of the tokens says that it should keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.cache import REWIND, KVCache, LayerCache
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.state import RecurrentCache, WindowCache
from tests.model_runs import decoded, peak_memory
from tests.tiny_sambay import make_tiny_sambay

TAPS, WINDOW = 4, 6

Tokens: TypeAlias = "list[float]"  # a token is a number; its keys, values and inputs are made of that number


def rows_of(tokens: Sequence[Tokens]) -> mx.array:
    return mx.array(tokens)[:, None, :, None]  # [B, K, T, Dh]


def states_of(tokens: Sequence[float]) -> list[np.float32]:
    """h after each token, of the recurrence h = h / 2 + token."""
    states, h = [], np.float32(0)
    for token in tokens:
        h = np.float32(h / 2 + np.float32(token))
        states.append(h)
    return states


def append(cache: LayerCache, tokens: Sequence[Tokens]) -> None:
    """Appends tokens [B, T] as a layer does, and checks what it gets back."""
    T = len(tokens[0])
    if isinstance(cache, RecurrentCache):
        B = len(tokens)
        tail, h = cache.arrays if cache.offset else (mx.zeros((B, TAPS - 1, 1)), mx.zeros((B, 1, 1)))
        states = []
        for t in range(T):
            h = h / 2 + mx.array([[[row[t]]] for row in tokens])
            states.append(h)
        inputs = mx.concatenate([tail, mx.array(tokens)[..., None]], axis=1)
        cache.update(inputs, states if T <= REWIND else states[-1:])
    else:
        assert isinstance(cache, (WindowCache, KVCache))
        keys, values = cache.update_and_fetch(rows_of(tokens), -rows_of(tokens))
        assert mx.array_equal(keys[:, :, -T:], rows_of(tokens)) and mx.array_equal(values, -keys)


def check(cache: LayerCache, tokens: Tokens) -> None:
    """Checks a cache of one row against all its tokens."""
    assert cache.offset == len(tokens)
    kept = [np.array(array) for array in cache.state]
    if not tokens:
        assert not sum(array.size for array in kept)
    elif isinstance(cache, RecurrentCache):
        inputs, h, length = kept
        assert inputs[0, :, 0].tolist() == ([0.0] * (TAPS - 1) + tokens)[1 - TAPS :]
        assert h[0, 0, 0] == states_of(tokens)[-1] and length == [len(tokens)]
        assert cache.nbytes >= sum(array.nbytes for array in (inputs, h))
    else:
        keys, values = kept[:2]
        expected = tokens[1 - WINDOW :] if isinstance(cache, WindowCache) else tokens
        assert keys[0, 0, :, 0].tolist() == expected and (values == -keys).all()
        assert cache.kept(len(tokens)) == len(expected)
        assert cache.nbytes >= keys.nbytes + values.nbytes


MAKERS: dict[str, Callable[[], LayerCache]] = {
    "recurrent": lambda: RecurrentCache(TAPS),
    "window": lambda: WindowCache(WINDOW),
    "all tokens": KVCache,
}
LENGTHS = st.one_of(st.integers(1, 4), st.sampled_from([WINDOW - 1, WINDOW, WINDOW + 1, REWIND, REWIND + 1, 70]))


@dataclass
class Moment:
    snapshot: Any
    tokens: Tokens


class OneSequence(RuleBasedStateMachine):
    """Tokens come and go in one cache."""

    make: Callable[[], LayerCache]

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.tokens, self.drawn = type(self).make(), [], 0
        self.left: list[tuple[LayerCache, Tokens]] = []  # caches that were forked, which no later token may change
        self.moments: list[Moment] = []
        self.latest = 0  # tokens of the latest pass that can be taken back

    @initialize(count=LENGTHS)
    def begin(self, count: int) -> None:
        self.append(count)

    @rule(count=LENGTHS)
    def append(self, count: int) -> None:
        new = [float(self.drawn + n + 1) for n in range(count)]
        self.drawn += count
        append(self.cache, [new])
        self.tokens, self.latest = [*self.tokens, *new], count if count <= REWIND else 0

    @rule(count=st.integers(1, REWIND), data=st.data())
    def guess(self, count: int, data: st.DataObject) -> None:
        """A short pass, of which some tokens are taken back, but not the first."""
        self.append(count)
        wrong = data.draw(st.integers(0, count - 1))
        assert self.cache.trim(wrong) == wrong
        if isinstance(self.cache, RecurrentCache):  # the other states are freed
            assert self.cache.nbytes == 4 * (TAPS - 1 + 1)
        self.tokens, self.latest = self.tokens[: len(self.tokens) - wrong], 0

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        n = data.draw(st.one_of(st.integers(-1, 8), st.integers(self.latest - 1, self.latest + 1)))
        length, possible = len(self.tokens), self.cache.can_trim(n)
        taken = self.cache.trim(n)
        assert taken == (0 if n <= 0 else length if n >= length else n if possible else 0)
        assert possible or not 0 < n < self.latest  # all tokens of a short pass but one; the newest is never wrong
        self.tokens = self.tokens[: length - taken]
        self.latest = 0 if taken or n == 0 else self.latest

    @rule()
    def mark(self) -> None:
        self.moments.append(Moment(self.cache.snapshot(), self.tokens))

    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """Goes back to a snapshot; where tokens can be trimmed, only to one that the present tokens begin with."""
        usable = [each for each in self.moments if each.tokens == self.tokens[: len(each.tokens)]]
        moments = usable if self.cache.is_trimmable() else self.moments
        if moments:
            moment = data.draw(st.sampled_from(moments))
            self.cache.restore(moment.snapshot)
            self.tokens, self.latest = moment.tokens, 0

    @rule()
    def fork(self) -> None:
        self.left = [*self.left[-2:], (self.cache, self.tokens)]
        self.cache, self.latest = self.cache.fork(len(self.tokens)), 0

    @rule()
    def compact(self) -> None:
        self.cache.compact()
        self.latest = 0

    @rule()
    def move(self) -> None:
        """To another cache, as a file does."""
        other = type(self).make()
        other.state = [mx.array(np.array(array)) for array in self.cache.state]
        self.cache, self.latest, self.moments = other, 0, []

    @invariant()
    def holds_the_tokens(self) -> None:
        check(self.cache, self.tokens)
        for cache, tokens in self.left:
            check(cache, tokens)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_cache_keeps_its_tokens_whatever_is_done_with_it(kind: str) -> None:
    machine = type(f"Machine of {kind}", (OneSequence,), {"make": staticmethod(MAKERS[kind])})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=20, deadline=None))


class Rows(RuleBasedStateMachine):
    """Sequences of any lengths come and go as rows of one batch."""

    @initialize()
    def start(self) -> None:
        self.batch = BatchCache([make() for make in MAKERS.values()], "short")
        self.rows: list[Tokens] = []
        self.drawn = 0

    def _new(self, count: int) -> Tokens:
        self.drawn += count
        return [float(self.drawn - n) for n in range(count)]

    def _cache(self) -> PromptCache:
        return PromptCache([make() for make in MAKERS.values()], None)

    @rule(lengths=st.lists(st.lists(LENGTHS, min_size=1, max_size=2), min_size=1, max_size=3))
    def join(self, lengths: list[list[int]]) -> None:
        caches = []
        for counts in lengths:
            cache, tokens = self._cache(), []
            for new in map(self._new, counts):
                for layer in cache:
                    append(layer, [new])
                tokens += new
            caches.append(cache)
            self.rows.append(tokens)
        self.batch.join(caches)

    @rule(count=st.integers(1, 40))
    def step(self, count: int) -> None:
        for _ in range(count if self.rows else 0):
            new = [self._new(1) for _ in self.rows]
            for layer in self.batch:
                append(layer, new)
            self.rows = [[*row, *each] for row, each in zip(self.rows, new, strict=True)]

    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        if self.rows:
            kept = data.draw(st.lists(st.sampled_from(range(len(self.rows))), unique=True))
            self.batch.keep(kept)
            self.rows = [self.rows[number] for number in kept]

    @invariant()
    def each_row_holds_its_tokens(self) -> None:
        assert self.batch.lengths == [len(row) for row in self.rows]
        for number, tokens in enumerate(self.rows):
            ids = [int(token) for token in tokens]
            cache = self.batch.copy_row(number, [*ids, 0], self._cache())
            assert cache.ids[0].tolist() == ids
            for layer in cache:
                check(layer, tokens)

    @invariant()
    def the_mask_hides_the_padding_of_both_kinds_of_keys(self) -> None:
        mask = self.batch.make_mask(1) if self.rows else None
        for number, tokens in enumerate(self.rows):
            seen = [True] * (self.batch.columns + 1) if mask is None else mask[number, 0, 0].tolist()
            assert sum(seen) == len(tokens) + 1 and all(seen[-len(tokens) - 1 :])


@pytest.mark.slow
def test_rows_of_a_batch_keep_their_tokens_as_others_come_and_go() -> None:
    run_state_machine_as_test(Rows, settings=settings(max_examples=12, stateful_step_count=10, deadline=None))


def test_a_prefill_leaves_no_more_memory_than_its_caches_report() -> None:
    """A slice would keep the whole chunk that it was cut out of."""
    model, prompt = make_tiny_sambay(sliding_window=64, max_position_embeddings=4096), [5, 6, 7] * 500
    decoded(model, prompt[:40], 1)
    cache, before = model.make_cache(), peak_memory(lambda: mx.zeros(1))
    decoded(model, prompt, 1, cache=cache, prefill_step_size=512)
    mx.eval(cache.ids)
    left = mx.get_active_memory() - before
    assert cache.needs_snapshots and cache.reusable(len(prompt) - 1) == len(prompt) - 1
    assert left <= 1.1 * (cache.nbytes + 4 * len(prompt))


@pytest.mark.slow
def test_the_generator_of_mlx_lm_draws_the_same_tokens() -> None:
    from mlx_lm.generate import generate_step as theirs
    from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

    model, prompt = make_tiny_sambay(), [5, 6, 7, 8] * 30
    cache = model.make_cache()
    steps = theirs(mx.array(prompt), model, max_tokens=12, prompt_cache=cache, prefill_step_size=16)
    assert [int(token) for token, _ in steps] == decoded(model, prompt, 12)
    assert not can_trim_prompt_cache(cache) and trim_prompt_cache(cache, 5) == 0 and cache.offset >= len(prompt) + 11

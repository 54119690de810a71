"""The loops under `generate_step`: tokens from forward passes, one at a time, as a mask allows, or ahead of themselves.

Every loop yields the same tokens as the first one would, and each a token when the pass after it is queued, so that the
device does not wait for whoever reads them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import mlx.core as mx

from phi4_mlx.cache import PromptCache

Drawn = tuple[int, mx.array]  # a token, and the log-probabilities [V] that it was drawn from

TIDY = 256  # passes between two looks for buffers of outgrown caches


class LogitsMask(Protocol):
    """What one answer must obey, such as a `phi4_mlx.constrain.Constraint`."""

    def mask(self) -> mx.array | None:
        """The tokens that may come next, bool [V]; None for any."""

    def accept(self, token: int) -> list[int] | None:
        """Takes a drawn token; the tokens that must follow it, or None if another must be drawn in its place."""


class Proposer(Protocol):
    """Who guesses the tokens to come, such as `phi4_mlx.speculate.PromptLookup`."""

    def begin(self, ids: Sequence[int]) -> None:
        """Told of the tokens that there are already."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Told of tokens that have become certain."""

    def took(self, tokens: int, seconds: float) -> None:
        """Told how long a forward pass of so many tokens took."""

    def pays(self) -> bool:
        """Whether a guess is worth waiting for the token before it."""

    def guess(self, most: int) -> list[int]:
        """The tokens that may come next, at most so many."""


class Passes(Protocol):
    """What the loops are made of."""

    cache: PromptCache

    def advance(self, ids: mx.array, rows: int, decoding: bool) -> mx.array:
        """Runs ids [1, T]; the logits of the last positions, [rows, V]."""

    def draw(
        self, logits: mx.array, row: int | None = None, mask: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """Tokens [rows] for the logits [rows, V] of a pass, and log-probabilities [rows, V]; or [1] for one row."""


def plain_steps(ids: mx.array, max_tokens: int, passes: Passes) -> Iterator[Drawn]:
    """Tokens as the model draws them; ids [1, T] are the prompt."""
    waiting: tuple[mx.array, mx.array] | None = None
    for drawn in range(max_tokens):
        token, logprobs = passes.draw(passes.advance(ids, 1, drawn > 0))
        mx.async_eval(token)
        if waiting is not None:
            yield int(waiting[0].item()), waiting[1]
        waiting, ids = (token, logprobs[0]), token[:, None]
        if drawn % TIDY == TIDY - 1:
            mx.clear_cache()
    if waiting is not None:
        yield int(waiting[0].item()), waiting[1]


def guessed_steps(ids: mx.array, max_tokens: int, passes: Passes, proposer: Proposer) -> Iterator[Drawn]:
    """As `plain_steps`; where guesses pay, a pass runs the newest token and its guesses, and keeps those that hold.

    Guessing needs the newest token, so the host reads it first. Where it does not pay the loop is that of
    `plain_steps`, and the proposer learns of each token one pass late.
    """
    proposer.begin([*passes.cache.ids[0].tolist(), *ids[0].tolist()])
    # Before a pass the newest token is either unread, in `waiting` and on the device in `ids`, or read, in `newest`.
    # Before the first one it is neither: then `ids` are the prompt.
    waiting: tuple[mx.array, mx.array] | None = None
    newest: int | None = None
    ready: list[Drawn] = []  # read, and not yielded
    left, count = max_tokens, 0
    while left:
        if waiting is not None and proposer.pays():
            newest = int(waiting[0].item())
            ready, waiting = [(newest, waiting[1])], None
            proposer.extend([newest])
        start = time.perf_counter()
        guesses = _guesses(proposer, passes.cache, left - 1, 1) if newest is not None else []
        if newest is not None:
            ids = mx.array([[newest, *guesses]], mx.int32)
        tokens, logprobs = passes.draw(passes.advance(ids, 1 + len(guesses), count > 0))
        mx.async_eval(tokens)
        if guesses:
            numbers = tokens.tolist()
            certain = numbers[: _alike(numbers, guesses) + 1]
            passes.cache.trim(len(guesses) + 1 - len(certain))
            proposer.took(1 + len(guesses), time.perf_counter() - start)
            ready += zip(certain, logprobs, strict=False)
            newest, left = certain[-1], left - len(certain)
            proposer.extend(certain)
        else:
            if waiting is not None:
                ready = [(int(waiting[0].item()), waiting[1])]
                proposer.took(1, time.perf_counter() - start)
                proposer.extend([ready[0][0]])
            waiting, ids, newest, left = (tokens, logprobs[0]), tokens[:, None], None, left - 1
        yield from ready
        ready, count = [], count + 1
        if count % TIDY == 0:
            mx.clear_cache()
    if waiting is not None:
        yield int(waiting[0].item()), waiting[1]


def masked_steps(
    ids: mx.array, max_tokens: int, passes: Passes, logits_mask: LogitsMask, proposer: Proposer | None
) -> Iterator[Drawn]:
    """Tokens as a mask lets them be drawn; each pass runs the token drawn, those that it forces, and guesses."""
    if proposer is not None:
        proposer.begin([*passes.cache.ids[0].tolist(), *ids[0].tolist()])
    waiting: list[Drawn] = []
    unread: list[int] = ids[0].tolist()
    left, count = max_tokens, 0
    while left:
        start = time.perf_counter()
        guesses = _guesses(proposer, passes.cache, left - 1, len(unread)) if proposer is not None and count else []
        logits = passes.advance(mx.array([[*unread, *guesses]], mx.int32), 1 + len(guesses), count > 0)
        mx.async_eval(logits)
        first = passes.draw(logits, 0, logits_mask.mask())  # the mask is made while the device runs
        mx.async_eval(first[0])
        yield from waiting
        certain = _obedient(first, logits, 0, passes, logits_mask)[:left]
        while (n := len(certain)) < min(left, len(logits)) and [token for token, _ in certain] == guesses[:n]:
            drawn = passes.draw(logits, n, logits_mask.mask())
            certain = (certain + _obedient(drawn, logits, n, passes, logits_mask))[:left]
        numbers = [token for token, _ in certain]
        held = min(_alike(numbers, guesses), len(numbers) - 1)
        if guesses:
            passes.cache.trim(len(guesses) - held)
        if proposer is not None:
            if count:
                proposer.took(len(unread) + len(guesses), time.perf_counter() - start)
            proposer.extend(numbers)
        waiting, unread = certain, numbers[held:]
        left, count = left - len(certain), count + 1
        if count % TIDY == 0:
            mx.clear_cache()
    yield from waiting


def _guesses(proposer: Proposer, cache: PromptCache, most: int, unread: int) -> list[int]:
    """What a proposer guesses, as far as the RoPE table stays the same."""
    guesses = proposer.guess(most) if most > 0 and proposer.pays() else []
    while guesses and cache.crosses(unread + len(guesses)):
        guesses.pop()
    return guesses


def _alike(tokens: Sequence[int], guesses: Sequence[int]) -> int:
    """How many guesses hold."""
    n = 0
    while n < min(len(tokens), len(guesses)) and tokens[n] == guesses[n]:
        n += 1
    return n


def _obedient(
    drawn: tuple[mx.array, mx.array], logits: mx.array, row: int, passes: Passes, logits_mask: LogitsMask
) -> list[Drawn]:
    """A token that the mask accepts, drawn from a row of the logits, and those that it forces."""
    token, logprobs = drawn
    number = int(token.item())
    while (forced := logits_mask.accept(number)) is None:
        token, logprobs = passes.draw(logits, row, logits_mask.mask())
        number = int(token.item())
    return [(number, logprobs[0]), *((each, _certain(each, logprobs[0])) for each in forced)]


def _certain(token: int, like: mx.array) -> mx.array:
    """Log-probabilities [V] of a token that is the only one."""
    return mx.where(mx.arange(like.shape[0]) == token, 0.0, -mx.inf).astype(like.dtype)

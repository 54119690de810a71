"""The loops under `generate_step`: tokens from forward passes, one at a time, as a mask allows, or ahead of themselves.

Every loop yields the same tokens as the first one would, and each a token when the pass after it is queued, so that the
device does not wait for whoever reads them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import Protocol

import mlx.core as mx

from phi4_mlx.errors import RequestError, check_whole
from phi4_mlx.generation.memory import PREFILL_STEP_SIZE
from phi4_mlx.generation.sampling import LogitsProcessor
from phi4_mlx.models.cache import PromptCache
from phi4_mlx.models.text import Model

Drawn = tuple[int, mx.array]  # a token, and the log-probabilities [V] that it was drawn from

TIDY = 256  # passes between two looks for buffers of outgrown caches


class LogitsMask(Protocol):
    """What one answer must obey, such as a `phi4_mlx.grammar.constraint.Constraint`."""

    def mask(self) -> mx.array | None:
        """The tokens that may come next, bool [V]; None for any."""

    def accept(self, token: int) -> list[int] | None:
        """Takes a drawn token; the tokens that must follow it, or None if another must be drawn in its place."""


class Proposer(Protocol):
    """Who guesses the tokens to come, such as `phi4_mlx.generation.speculate.PromptLookup`."""

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

Progress = Callable[[int, int], None]


def generate_step(
    prompt_ids: Sequence[int] | mx.array,
    model: Model,
    *,
    max_tokens: int = 256,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: Iterable[LogitsProcessor] | None = None,
    logits_mask: LogitsMask | None = None,
    cache: PromptCache | None = None,
    kv_bits: int | None = None,
    max_kv_size: int | None = None,
    proposer: Proposer | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    prompt_progress_callback: Progress | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Prefills a prompt and yields tokens; it knows no text and no end marker, so the caller stops it.

    Args:
        prompt_ids: the prompt [S], a list or an array of MLX or NumPy; with a filled cache, what comes after it.
        model: what `load` returned.
        max_tokens: how many tokens to draw at most.
        sampler: log-probabilities [n, V] -> tokens [n]; the default takes the likeliest. n is 1, and more only where a
            `proposer` has guessed.
        logits_processors: each (all ids so far [S], logits [1, V]) -> logits [1, V], in turn.
        logits_mask: the tokens that may come next, looked at after the processors and before the sampler; for one
            answer only. What it forces is yielded too, and costs no step of its own.
        cache: from `model.make_cache()`; appended to. It may hold a step more than was yielded: one token, or one and
            those that a `logits_mask` forced or a `proposer` guessed.
        kv_bits: 4 or 8 quantises the keys and values of a cache that is made here.
        max_kv_size: how many tokens that cache may hold; see `phi4_mlx.models.cache.KVCache`.
        proposer: guesses tokens ahead, such as a `PromptLookup`; for one answer at a time.
        prefill_step_size: tokens a chunk.
        prompt_progress_callback: called with (tokens done, tokens in all) before, during and after a prefill, also one
            that a RoPE crossing makes necessary.

    Yields:
        (token, log-probabilities [V]); the latter are computed only if they are looked at.

    Raises:
        RequestError: no tokens, what are no tokens or outside the vocabulary, or more than the context holds.
    """
    prompt = _whole_numbers(prompt_ids)
    cache = _cache(model, cache, kv_bits, max_kv_size)
    check_whole("max_tokens", max_tokens, 1)
    check_whole("prefill_step_size", prefill_step_size, 1)
    _check_prompt(prompt, model, cache.offset, max_tokens)
    if proposer is not None and cache.bounded:
        raise RequestError("a proposer takes wrong guesses back, which a cache with a max_kv_size cannot; drop one")
    passes = _Passes(model, cache, sampler, list(logits_processors or ()), prefill_step_size, prompt_progress_callback)
    ids = mx.array([prompt], mx.int32)  # [1, T]
    if logits_mask is not None:
        return masked_steps(ids, max_tokens, passes, logits_mask, proposer)
    if proposer is not None:
        return guessed_steps(ids, max_tokens, passes, proposer)
    return plain_steps(ids, max_tokens, passes)


def _whole_numbers(ids: Sequence[int] | mx.array) -> list[int]:
    """Ids from a list, or from an array of MLX or NumPy."""
    try:
        return [index(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:
        raise RequestError(
            f"the prompt must be token ids, whole numbers in one dimension, not {ids!r:.60}; tokenizer.encode makes "
            "them of a text"
        ) from None


def _cache(model: Model, cache: PromptCache | None, kv_bits: int | None, max_kv_size: int | None) -> PromptCache:
    """The cache given, or a new one of the kind that is asked for."""
    if cache is None:
        return model.make_cache(kv_bits=kv_bits, max_kv_size=max_kv_size)
    if kv_bits is not None or max_kv_size is not None:
        raise RequestError("a cache that is given has its kind already; give kv_bits and max_kv_size to make_cache")
    return cache


def _check_prompt(prompt: list[int], model: Model, cached: int, max_tokens: int) -> None:
    context, V = model.config.max_position_embeddings, model.config.vocab_size
    if not prompt:
        raise RequestError(f"the prompt has 0 tokens; it needs at least 1, and the context holds {context}")
    if not (min(prompt) >= 0 and max(prompt) < V):
        outside = next(token for token in prompt if not 0 <= token < V)
        raise RequestError(f"token {outside} of the prompt is outside the model's vocabulary of {V}")
    total = cached + len(prompt) + max_tokens
    if total > context:
        before = f"{cached} cached tokens, " if cached else ""
        raise RequestError(
            f"{before}{len(prompt)} prompt tokens and max_tokens {max_tokens} come to {total}, and the context holds "
            f"{context}; shorten the prompt or lower max_tokens"
        )


@dataclass
class _Passes:
    """The forward passes of one answer, and how tokens are drawn from them; see `phi4_mlx.generation.steps.Passes`."""

    model: Model
    cache: PromptCache
    sampler: Callable[[mx.array], mx.array] | None
    processors: list[LogitsProcessor]
    step_size: int
    progress: Progress | None

    def advance(self, ids: mx.array, rows: int, decoding: bool) -> mx.array:
        """Runs ids [1, T] in chunks, and all of the sequence at a RoPE crossing; the last chunk has all the rows."""
        T, cache, progress = ids.shape[1], self.cache, self.progress
        decoding = decoding or (T == 1 and cache.offset > 0)
        ids = cache.admit(ids, reach=cache.offset + T)
        total = ids.shape[1]
        stops = [*range(self.step_size, total - rows + 1, self.step_size), total]
        if progress and decoding and total == T:
            progress = None
        try:
            if progress:
                progress(0, total)
            for start, stop in pairwise([0, *stops]):
                hidden = self.model.model(ids[:, start:stop], cache, rows=rows)
                if stop < total:
                    mx.eval([layer.state for layer in cache])
                    mx.clear_cache()
                    if progress:
                        progress(stop, total)
        finally:
            cache.forget_reach()
        logits = self.model.logits(hidden)[0]
        if progress:
            mx.eval(logits)
            progress(total, total)
        return logits

    def draw(
        self, logits: mx.array, row: int | None = None, mask: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """Tokens, as processors, mask and sampler have it in turn."""
        rows = range(logits.shape[0]) if row is None else [row]
        if self.processors:
            logits = mx.concatenate([self._processed(logits, each) for each in rows])
        elif row is not None:
            logits = logits[row : row + 1]
        if mask is not None:
            logits = mx.where(mask, logits, -mx.inf)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return (mx.argmax(logits, axis=-1) if self.sampler is None else self.sampler(logprobs)), logprobs

    def _processed(self, logits: mx.array, row: int) -> mx.array:
        """A row of the logits, bent by what the tokens before it are."""
        ids, bent = self.cache.ids[0], logits[row : row + 1]
        for process in self.processors:
            bent = process(ids[: ids.shape[0] - (logits.shape[0] - 1 - row)], bent)
        return bent

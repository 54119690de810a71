"""Three decode loops: plain, grammar-masked, speculative.

Each yields the tokens that the plain loop would. A token is yielded once the pass after it is queued, so that the
device never waits for the reader.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from operator import index

import mlx.core as mx

from phi4_mlx.errors import RequestError
from phi4_mlx.generation.draws import Draws, apply_processors, draw, joined, wanted
from phi4_mlx.generation.memory import PREFILL_STEP_SIZE
from phi4_mlx.generation.options import DecodeOptions, LogitsMask, Progress, Proposer
from phi4_mlx.generation.sampling import Draw, LogitsProcessor
from phi4_mlx.models.cache import REWIND
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.queued import queue
from phi4_mlx.models.safe import safe
from phi4_mlx.models.shared_stream import shared_stream
from phi4_mlx.models.split_logits import Logits, array_of
from phi4_mlx.tokens.prefix import shared_length
from phi4_mlx.tokens.prompt import Place, Prompt, places_of

Drawn = tuple[int, mx.array]  # a token, and the log-probabilities [V] it was drawn from

CLEAR_EVERY = 256  # passes; frees the buffers of outgrown caches


def generate_step(
    prompt_ids: Sequence[int] | mx.array,
    model: LanguageModel,
    *,
    max_tokens: int = 256,
    sampler: Draw | None = None,
    logits_processors: Iterable[LogitsProcessor] | None = None,
    logits_mask: LogitsMask | None = None,
    cache: PromptCache | None = None,
    kv_bits: int | None = None,
    max_kv_size: int | None = None,
    proposer: Proposer | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    prompt_progress_callback: Progress | None = None,
) -> Iterator[Drawn]:
    """Prefills a prompt and yields tokens; it knows no text and no end marker, so the caller stops it.

    Args:
        prompt_ids: the prompt [S], a list or an array of MLX or NumPy; with a filled cache, the ids after it. A prompt
            with media is a `Prompt`, as `tokenizer.apply_chat_template` returns.
        model: from `load`.
        max_tokens: the most tokens to draw.
        sampler: log-probabilities [n, V] -> tokens [n]; None takes the likeliest. n is 1, and more only with a
            `proposer`.
        logits_processors: each (all ids so far [S], logits [1, V]) -> logits [1, V], in turn.
        logits_mask: the tokens allowed next, applied after the processors and before the sampler; for one answer only.
            Tokens that it forces are yielded too, without a step of their own.
        cache: from `model.make_cache()`; appended to. It may be one step ahead of the last yielded token.
        kv_bits: 4 or 8 quantises the keys and values of the cache made here.
        max_kv_size: the most tokens that cache keeps; see `phi4_mlx.models.cache.KVCache`.
        proposer: guesses tokens ahead, such as a `PromptLookup`; for one answer at a time.
        prefill_step_size: tokens a prefill chunk.
        prompt_progress_callback: called with (tokens done, tokens in all) before, during and after a prefill,
            including the one at a RoPE crossing.

    Yields:
        (token, log-probabilities [V]); the latter are computed only when they are read.

    Raises:
        RequestError: the prompt is empty, is not token ids, is outside the vocabulary, has media that the model cannot
            read or slots without media, or exceeds the context.
    """
    options = DecodeOptions(
        max_tokens, sampler, logits_processors, logits_mask, None, kv_bits, max_kv_size, proposer, prefill_step_size,
        prompt_progress_callback,
    )  # fmt: skip
    return decode(prompt_ids, model, open_cache(model, cache, options), options)


def open_cache(model: LanguageModel, cache: PromptCache | None, options: DecodeOptions) -> PromptCache:
    """The given cache, or a new one of the kind in `options`.

    Raises:
        RequestError: there is a cache, and the options name a kind.
    """
    if cache is None:
        return model.make_cache(kv_bits=options.kv_bits, max_kv_size=options.max_kv_size)
    if options.kv_bits is not None or options.max_kv_size is not None:
        raise RequestError("a cache that is given has its kind already; give kv_bits and max_kv_size to make_cache")
    return cache


def decode(
    prompt_ids: Sequence[int] | mx.array, model: LanguageModel, cache: PromptCache, options: DecodeOptions
) -> Iterator[Drawn]:
    """`generate_step` with its options in one value and its cache open."""
    prompt = _token_ids(prompt_ids)
    model.check_ids(prompt)
    _check_room(prompt, model, cache.offset, options.max_tokens)
    if options.proposer is not None and not cache.rewindable:
        raise RequestError(
            "a proposer needs a cache that can take back wrong guesses, and this one cannot; drop the proposer, or "
            "max_kv_size if it is set"
        )
    passes = _Passes(model, cache, options, places_of(prompt))
    ids = mx.array([prompt], mx.int32)  # [1, T]
    if options.logits_mask is not None:
        return _in_turn(_masked_steps(ids, options.max_tokens, passes, options.logits_mask, options.proposer))
    if options.proposer is not None:
        return _in_turn(_guessed_steps(ids, options.max_tokens, passes, options.proposer))
    return _in_turn(_plain_steps(ids, options.max_tokens, passes))


def _in_turn(steps: Iterator[Drawn]) -> Iterator[Drawn]:
    """The steps of one answer, each on the shared stream: threads take turns, and one may continue another's answer."""
    while True:
        with shared_stream():
            drawn = next(steps, None)
        if drawn is None:
            return
        yield drawn


def chunk_ends(total: int, step_size: int, rows: int, *, snapshots: bool, also: Iterable[int] = ()) -> list[int]:
    """The end of each chunk of `total` tokens; the last one has at least `rows` positions.

    With `snapshots`, a chunk also ends before the last `rows` tokens, so that the same prompt can run again from there.
    Further ends are in `also`, such as those of pictures, so that reading them shows progress.
    """
    last, step_size = total - rows, total if safe("chunks") else step_size
    further = {last, *also} if snapshots else {*also}
    return sorted({*range(step_size, last + 1, step_size), *(end for end in further if 0 < end <= last), total})


def _token_ids(ids: Sequence[int] | mx.array) -> list[int]:
    """Ids from a list, or from an array of MLX or NumPy."""
    if isinstance(ids, Prompt):
        return ids
    try:
        return [index(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:
        raise RequestError(
            f"the prompt must be token ids, whole numbers in one dimension, not {ids!r:.60}; tokenizer.encode makes "
            "them from a text"
        ) from None


def _check_room(prompt: list[int], model: LanguageModel, cached: int, max_tokens: int) -> None:
    context = model.config.max_position_embeddings
    total = cached + len(prompt) + max_tokens
    if total > context:
        before, room = f"{cached} cached tokens, " if cached else "", context - total + max_tokens
        way_out = f"lower max_tokens to {room}" if room > 0 else "shorten the prompt, or leave out its oldest turns"
        raise RequestError(
            f"{before}{len(prompt)} prompt tokens and max_tokens {max_tokens} come to {total}, and the context holds "
            f"{context}{model.config.context_note}; {way_out}"
        )


@dataclass
class _Passes:
    """The forward passes of one answer, and the draws from them."""

    model: LanguageModel
    cache: PromptCache
    options: DecodeOptions
    places: Sequence[Place] = ()  # of the prompt's media, until the first pass

    def __post_init__(self) -> None:
        self._processors = list(self.options.logits_processors or ())

    def advance(self, ids: mx.array, rows: int, decoding: bool) -> Logits:
        """Runs ids [1, T] in chunks, at a RoPE crossing the whole sequence; the logits of the last `rows` positions."""
        T, cache, step_size = ids.shape[1], self.cache, self.options.prefill_step_size
        one_more = T == 1 and cache.offset > 0
        ids, self.places = cache.admit(ids, self.places), ()
        total = ids.shape[1]
        prefill = not decoding or total > T
        progress = self.options.prompt_progress_callback if prefill and not (one_more and total == T) else None
        snapshots = prefill and cache.needs_snapshots
        if snapshots:
            cache.mark()
        if progress:
            progress(0, total)
        media_ends = [place.end for place in cache.tokens.next_places(total)] if progress else []
        ends = chunk_ends(total, step_size, rows, snapshots=snapshots, also=media_ends)
        for start, stop in pairwise([0, *ends]):
            hidden = self.model.hidden(ids[:, start:stop], cache, rows=rows)
            if stop < total:
                finish_chunk(cache, snapshots)
                if progress:
                    progress(stop, total)
        logits = self.model.candidates(hidden, *wanted([self.options.sampler]))
        if progress:
            mx.eval(array_of(logits))
            progress(total, total)
        return logits

    def take_back(self, n: int) -> None:
        """Removes the last n tokens, wrong guesses of the latest pass, from the cache."""
        taken = self.cache.trim(n)
        assert taken == n, f"the cache took back {taken} of {n} tokens"

    def draw(self, logits: Logits, row: int | None = None, mask: mx.array | None = None) -> Draws:
        """Tokens for the logits [n, V] of a pass, or for one of its rows."""
        rows = range(len(logits)) if row is None else [row]
        if self._processors:
            logits = joined([self._processed(logits, each) for each in rows])
        elif row is not None:
            logits = logits[row : row + 1]
        return draw(logits, self.options.sampler, mask)

    def _processed(self, logits: Logits, row: int) -> Logits:
        """One row of the logits, processed with the tokens before it."""
        ids = self.cache.ids[0]
        before = ids[: ids.shape[0] - (len(logits) - 1 - row)]
        return apply_processors(self._processors, before, logits[row : row + 1])


def finish_chunk(cache: PromptCache, snapshot: bool) -> None:
    """Computes what a chunk has cached, frees its activations, and takes a snapshot if asked to."""
    mx.eval([layer.state for layer in cache])
    mx.clear_cache()
    if snapshot:
        cache.mark()


def _plain_steps(ids: mx.array, max_tokens: int, passes: _Passes) -> Iterator[Drawn]:
    """Tokens as the model draws them; ids [1, T] are the prompt."""
    waiting: Draws | None = None
    for drawn in range(max_tokens):
        draws = passes.draw(passes.advance(ids, 1, drawn > 0))
        draws.queue()
        if waiting is not None:
            yield waiting.numbers()[0], waiting.logprobs[0]
        waiting, ids = draws, draws.tokens[:, None]
        if drawn % CLEAR_EVERY == CLEAR_EVERY - 1:
            mx.clear_cache()
    if waiting is not None:
        yield waiting.numbers()[0], waiting.logprobs[0]


def _guessed_steps(ids: mx.array, max_tokens: int, passes: _Passes, proposer: Proposer) -> Iterator[Drawn]:
    """`_plain_steps` where a pass runs the newest token and guesses after it, and keeps the guesses that hold.

    Guessing needs the newest token, so the host reads it first. Where guessing does not pay, the loop is that of
    `_plain_steps`, and the proposer learns of each token one pass late.
    """
    proposer.begin([*passes.cache.ids[0].tolist(), *ids[0].tolist()])
    # Before a pass the newest token is either unread, in `waiting` and on the device in `ids`, or read, in `newest`.
    # Before the first pass it is neither: `ids` are the prompt.
    waiting: Draws | None = None
    newest: int | None = None
    ready: list[Drawn] = []  # read and not yet yielded
    left, count = max_tokens, 0
    while left:
        if waiting is not None and proposer.pays():
            newest = waiting.numbers()[0]
            ready, waiting = [(newest, waiting.logprobs[0])], None
            proposer.extend([newest])
        start = time.perf_counter()
        guesses = _guesses(proposer, passes, left - 1, 1) if newest is not None else []
        if newest is not None:
            ids = mx.array([[newest, *guesses]], mx.int32)
        draws = passes.draw(passes.advance(ids, 1 + len(guesses), count > 0))
        draws.queue()
        if guesses:
            numbers = draws.numbers()
            certain = numbers[: shared_length(numbers, guesses) + 1]
            passes.take_back(len(guesses) + 1 - len(certain))
            proposer.took(1 + len(guesses), time.perf_counter() - start)
            ready += zip(certain, draws.logprobs, strict=False)
            newest, left = certain[-1], left - len(certain)
            proposer.extend(certain)
        else:
            if waiting is not None:
                ready = [(waiting.numbers()[0], waiting.logprobs[0])]
                proposer.took(1, time.perf_counter() - start)
                proposer.extend([ready[0][0]])
            waiting, ids, newest, left = draws, draws.tokens[:, None], None, left - 1
        yield from ready
        ready, count = [], count + 1
        if count % CLEAR_EVERY == 0:
            mx.clear_cache()
    if waiting is not None:
        yield waiting.numbers()[0], waiting.logprobs[0]


def _masked_steps(
    ids: mx.array, max_tokens: int, passes: _Passes, logits_mask: LogitsMask, proposer: Proposer | None
) -> Iterator[Drawn]:
    """Tokens that a mask allows; each pass runs the last drawn token, the tokens it forces, and guesses."""
    if proposer is not None:
        proposer.begin([*passes.cache.ids[0].tolist(), *ids[0].tolist()])
    waiting: list[Drawn] = []
    unread: list[int] = ids[0].tolist()
    left, count = max_tokens, 0
    while left:
        start = time.perf_counter()
        guesses = _guesses(proposer, passes, left - 1, len(unread)) if proposer is not None and count else []
        logits = passes.advance(mx.array([[*unread, *guesses]], mx.int32), 1 + len(guesses), count > 0)
        queue(array_of(logits))
        first = passes.draw(logits, 0, logits_mask.mask())  # the host computes the mask while the device runs
        first.queue()
        yield from waiting
        certain = _accepted(first, logits, 0, passes, logits_mask)[:left]
        while (n := len(certain)) < min(left, len(logits)) and [token for token, _ in certain] == guesses[:n]:
            drawn = passes.draw(logits, n, logits_mask.mask())
            certain = (certain + _accepted(drawn, logits, n, passes, logits_mask))[:left]
        numbers = [token for token, _ in certain]
        kept = min(shared_length(numbers, guesses), len(numbers) - 1)
        if guesses:
            passes.take_back(len(guesses) - kept)
        if proposer is not None:
            if count:
                proposer.took(len(unread) + len(guesses), time.perf_counter() - start)
            proposer.extend(numbers)
        waiting, unread = certain, numbers[kept:]
        left, count = left - len(certain), count + 1
        if count % CLEAR_EVERY == 0:
            mx.clear_cache()
    yield from waiting


def _guesses(proposer: Proposer, passes: _Passes, most: int, unread: int) -> list[int]:
    """Guesses of a proposer, cut at a slot, where the cache could not take them back, or at another RoPE table."""
    most, slots = min(most, REWIND - unread), passes.model.slot_ids
    guesses = proposer.guess(most)[:most] if most > 0 and proposer.pays() else []
    if slots:
        guesses = [*takewhile(lambda token: token not in slots, guesses)]
    while guesses and passes.cache.crosses(unread + len(guesses)):
        guesses.pop()
    return guesses


def _accepted(
    draws: Draws, logits: Logits, row: int, passes: _Passes, logits_mask: LogitsMask
) -> list[Drawn]:
    """The first token drawn from a row of the logits that the mask accepts, and the tokens it forces."""
    while (forced := logits_mask.accept(number := draws.numbers()[0])) is None:
        draws = passes.draw(logits, row, logits_mask.mask())
    logprobs = draws.logprobs[0]
    return [(number, logprobs), *((each, _certain(each, logprobs)) for each in forced)]


def _certain(token: int, like: mx.array) -> mx.array:
    """Log-probabilities [V] of a token with probability 1."""
    return mx.where(mx.arange(like.shape[0]) == token, 0.0, -mx.inf).astype(like.dtype)

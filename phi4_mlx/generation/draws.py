"""Tokens drawn from logits: the one place where tokens come from.

Where a model's head is split over ranks, most draws look at the likeliest logits of each rank alone. They are those
that all logits would give: the sampler runs on the known logits and on bounds of the others, with the same random
numbers, and where the result depends on a logit that is not known, more are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from phi4_mlx.errors import CheckpointError
from phi4_mlx.generation.sampling import Draw, LogitsProcessor, Processor, Sampler, SeededSampler
from phi4_mlx.models.queued import queue
from phi4_mlx.models.split_logits import LEAST, Logits, SplitLogits

_RANDOM = 256  # logits of each rank that a draw at random looks at first


class Draws(NamedTuple):
    """Tokens on the device.

    Attributes:
        tokens: [n].
        logprobs: log-probabilities [n, V], computed only when they are read. Where the head is split over ranks, -inf
            for tokens that no rank has among its likeliest; under a mask, of the tokens that were gathered.
        scores: numbers [n, 1] that are finite if all logits are.
    """

    tokens: mx.array
    logprobs: mx.array
    scores: mx.array

    def queue(self) -> None:
        """Starts the computation of the tokens."""
        queue(self.tokens, self.scores)

    def numbers(self) -> list[int]:
        """The tokens as ids, once they are computed.

        Raises:
            CheckpointError: the model computed NaN or infinity.
        """
        if not all(math.isfinite(score) for (score,) in self.scores.tolist()):
            raise CheckpointError(
                "the model computed NaN or infinity instead of logits: its weights or the adapter's are damaged, or "
                "too large for their dtype; get them again, or convert with --dtype float32"
            )
        return list(self.tokens.tolist())


def wanted(samplers: Sequence[Draw | None]) -> tuple[int, tuple[float, ...]]:
    """`count` and `temps` of `LanguageModel.candidates` for draws by these samplers, one a row or one for all."""
    count, temps = LEAST, []
    for sampler in samplers:
        settings = _settings(sampler)
        random = settings is not None and settings.temp > 0
        temps.append(settings.divisor if settings is not None and random else 1.0)
        if settings is not None and random:
            count = max(count, settings.top_k or _RANDOM)
    return count, () if all(temp == 1.0 for temp in temps) else tuple(temps)


def draw(logits: Logits, sampler: Draw | None, mask: mx.array | None = None) -> Draws:
    """Draws a token from each row of logits.

    Args:
        logits: [n, V], after any processors; those of a split head, of which a draw looks at all only where nothing
            less settles it, or where the sampler is not one of `make_sampler`.
        sampler: None takes the likeliest token.
        mask: allowed tokens, bool [V]; None for all.

    Returns:
        The tokens with their log-probabilities.
    """
    if isinstance(logits, SplitLogits):
        return _draw_split(logits, sampler, mask)
    if mask is not None:
        logits = mx.where(mask, logits, -mx.inf)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    logprobs = logits - total
    if sampler is not None:  # ours draw alike from both; in half precision log-probabilities are rounded once more
        return Draws(sampler(logprobs if _settings(sampler) is None else logits), logprobs, total)
    tokens = mx.argmax(logits, axis=-1)  # a NaN or an infinity wins it
    return Draws(tokens, logprobs, mx.take_along_axis(logits, tokens[:, None], axis=-1))


def apply_processors(processors: Iterable[LogitsProcessor], ids: mx.array, logits: Logits) -> Logits:
    """Logits [1, V] after each processor in turn; `ids` [S] are the tokens before them."""
    steps = [partial(process, ids) for process in processors]
    if isinstance(logits, SplitLogits):
        if all(isinstance(step.func, Processor) for step in steps):
            return logits.changed(partial(_in_turn, steps))
        logits = logits.whole()  # any logit may depend on any other
    return _in_turn(steps, logits)


def joined(rows: Sequence[Logits]) -> Logits:
    """Rows of the same pass, one below the other."""
    if all(isinstance(row, SplitLogits) for row in rows):
        return SplitLogits.joined([row for row in rows if isinstance(row, SplitLogits)])
    return mx.concatenate([row.whole() if isinstance(row, SplitLogits) else row for row in rows])


def _in_turn(steps: Iterable[Callable[[mx.array], mx.array]], logits: mx.array) -> mx.array:
    for step in steps:
        logits = step(logits)
    return logits


def _settings(sampler: Draw | None) -> Sampler | None:
    """The settings of one of our samplers; None for another one, and for none."""
    return sampler.sampler if isinstance(sampler, SeededSampler) else sampler if isinstance(sampler, Sampler) else None


def _draw_split(logits: SplitLogits, sampler: Draw | None, mask: mx.array | None) -> Draws:
    """`draw` from the likeliest logits of each rank, and from more where they do not settle it."""
    settings = _settings(sampler)
    if sampler is not None and settings is None:
        return draw(logits.whole(), sampler, mask)
    if settings is None or settings.temp == 0:
        if mask is None and not any(logits.changes):
            return _Known(logits, mask, settings).likeliest()
        settings = None
    V = logits.parts[-1][1]
    noise = None
    if settings is not None:
        key = sampler.next_key() if isinstance(sampler, SeededSampler) else None
        noise = settings.noise((len(logits), V), key)
    found: Logits = logits
    while isinstance(found, SplitLogits):
        known = _Known(found, mask, settings)
        tokens, settled = known.choose(noise)
        if settled.all():
            return Draws(tokens, known.logprobs, known.score)
        found = found.more()
    drawn = draw(found, None, mask)
    if settings is None or noise is None:
        return drawn
    allowed = found if mask is None else mx.where(mask, found, -mx.inf)
    return drawn._replace(tokens=settings.choose(settings.tempered(allowed), noise))


class _Known:
    """The known logits of some rows, and bounds of the others.

    Args:
        split: the rows.
        mask: allowed tokens, bool [V].
        settings: None takes the likeliest token.
    """

    def __init__(self, split: SplitLogits, mask: mx.array | None, settings: Sampler | None) -> None:
        self._split, self._settings = split, settings
        self._values, self._ids = split.known
        self._given = split.bounds
        logits = split.apply_changes(self._given.astype(split.dtype))
        self._bounds = logits if mask is None else mx.where(mask, logits, -mx.inf)
        self._is_known = mx.put_along_axis(mx.zeros(logits.shape, mx.bool_), self._ids, mx.array(True), axis=-1)
        self._exact = mask is None and not any(split.changes)

    def likeliest(self) -> Draws:
        """The likeliest tokens of unchanged logits: the largest of each rank are known."""
        best = self._values.max(axis=-1, keepdims=True)
        place = mx.argmax(self._values == best, axis=-1, keepdims=True)  # the first: ids are in order
        return Draws(mx.take_along_axis(self._ids, place, axis=-1)[:, 0], self.logprobs, self.total)

    @property
    def logprobs(self) -> mx.array:
        """Log-probabilities of the known tokens, -inf for others, [n, V]."""
        return mx.where(self._is_known, self._bounds - self.total.astype(self._bounds.dtype), -mx.inf)

    @property
    def total(self) -> mx.array:
        """The log-sum-exp of all logits where they are unchanged; else of those known, [n, 1]."""
        least, most = self._totals(1.0, self._split.others[0])
        return most if self._exact else least

    @property
    def score(self) -> mx.array:
        """A number [n, 1] that is finite if all logits are, also those that are not known."""
        return self._totals(1.0, self._split.others[0])[1]

    def _totals(self, divisor: float, others: mx.array) -> tuple[mx.array, mx.array]:
        """Two log-sum-exps of all logits over a temperature [n, 1]: the true one is neither below nor above them."""
        known = mx.where(self._is_known, self._bounds, -mx.inf).astype(mx.float32) / divisor
        raised = (self._bounds > self._given) & ~self._is_known  # by a bias
        above = mx.where(raised, self._bounds, -mx.inf).astype(mx.float32) / divisor
        own = mx.logsumexp(known, axis=-1, keepdims=True)
        most = mx.logsumexp(mx.concatenate([known, above, others], axis=-1), axis=-1, keepdims=True)
        return (most if self._exact else own), most

    def choose(self, noise: mx.array | None) -> tuple[mx.array, mx.array]:
        """Tokens [n], and True for each that does not depend on a logit that is not known."""
        settings = self._settings
        if settings is None or noise is None:
            tokens = mx.argmax(self._bounds, axis=-1)
            return tokens, self._knows(tokens[:, None])
        logits = settings.tempered(self._bounds)
        if noise.shape != logits.shape:
            largest = settings.largest(logits)
            return settings.choose(logits, noise), self._knows(largest)
        settled = mx.full(len(noise), True)
        if settings.min_p or settings.has_nucleus:
            settled = self._knows(mx.argmax(logits, axis=-1, keepdims=True))
        scores = settings.allowed(logits) + noise
        if settings.has_nucleus:
            inside, complete = self._nucleus(logits, settings)
            scores, settled = mx.where(inside, scores, -mx.inf), settled & complete
        tokens = mx.argmax(scores, axis=-1)
        return tokens, settled & self._knows(tokens[:, None])

    def _knows(self, tokens: mx.array) -> mx.array:
        """True for rows [n] of which all these tokens [n, m] are known, or masked."""
        certain = self._is_known | (self._bounds == -mx.inf)
        return mx.take_along_axis(certain, tokens, axis=-1).all(axis=-1)

    def _nucleus(self, logits: mx.array, settings: Sampler) -> tuple[mx.array, mx.array]:
        """The tokens that `top_p` keeps, bool [n, V], and True for rows [n] of which that is certain."""
        limit = mx.where(self._is_known, -mx.inf, logits).max(axis=-1, keepdims=True)
        values = mx.take_along_axis(logits, self._ids, axis=-1)
        order = mx.argsort(-values, axis=-1)
        values, ids = (mx.take_along_axis(each, order, axis=-1) for each in (values, self._ids))
        kept = []
        for total in self._totals(settings.divisor, self._split.others[1]):
            probs = mx.exp(values - total)
            kept.append(mx.cumsum(probs, axis=-1) - probs < settings.top_p)
        complete = ((values > limit) & ~kept[1]).any(axis=-1) | (limit == -mx.inf)[:, 0]
        inside = mx.put_along_axis(mx.zeros(logits.shape, mx.bool_), ids, kept[1], axis=-1)
        return inside, complete & (kept[0] == kept[1]).all(axis=-1)

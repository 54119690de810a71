"""Samplers map logits to tokens; logits processors change the logits before that.

The order is the reference's: penalties and bias, temperature, then top-k, top-p and min-p, each on the tempered logits,
so that a cut-off applies to the distribution that is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import mlx.core as mx

from phi4_mlx.errors import CheckpointError, RequestError, check_number, check_whole
from phi4_mlx.models.compiled import compiled
from phi4_mlx.models.queued import queue
from phi4_mlx.terminal.limits import PENALTY_RANGE, REPETITION_PENALTY_RANGE, SEED_LIMIT, TEMPERATURE_LIMIT, TOP_K_LIMIT

_MISS = math.log(2**-32)  # log of the accepted probability that no draw of several lies in the nucleus
_MAX_TRIES = 16  # at a top_p of 0.75; below that, sorting is as fast
_BLOCK = 512  # token ids
_MIN_TEMP = 1e-30  # keeps logits finite in float32; far above it, only the likeliest token is ever drawn

Draw = Callable[[mx.array], mx.array]  # logits or log-probabilities [n, V] -> tokens [n]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]  # (tokens so far [S], logits [1, V]) -> logits [1, V]


class Draws(NamedTuple):
    """Tokens on the device.

    Attributes:
        tokens: [n].
        logprobs: log-probabilities [n, V], computed only when they are read.
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


def draw(logits: mx.array, sampler: Draw | None, mask: mx.array | None = None) -> Draws:
    """Draws a token from each row of logits: the one place where tokens come from.

    Args:
        logits: [n, V], after any processors.
        sampler: None takes the likeliest token.
        mask: allowed tokens, bool [V]; None for all.

    Returns:
        The tokens with their log-probabilities.
    """
    if mask is not None:
        logits = mx.where(mask, logits, -mx.inf)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    logprobs = logits - total
    if sampler is not None:
        return Draws(sampler(logprobs), logprobs, total)
    tokens = mx.argmax(logits, axis=-1)  # a NaN or an infinity wins it
    return Draws(tokens, logprobs, mx.take_along_axis(logits, tokens[:, None], axis=-1))


def apply_processors(processors: Iterable[LogitsProcessor], ids: mx.array, logits: mx.array) -> mx.array:
    """Logits [1, V] after each processor in turn; `ids` [S] are the tokens before them."""
    for process in processors:
        logits = process(ids, logits)
    return logits


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; names, ranges and meaning are those of `make_sampler` and `make_logits_processors`."""

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Sampling:
        """The sampling settings among command-line settings, by their option names; others are ignored."""
        values = {name.replace("-", "_"): value for name, value in settings.items()}
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})

    @property
    def seeded(self) -> bool:
        """True if the draws are random and must be repeatable."""
        return self.seed is not None and self.temp > 0

    def sampler(self) -> Draw:
        """See `make_sampler`."""
        return make_sampler(self.temp, self.top_p, self.min_p, self.top_k, self.seed)

    def processors(self) -> list[LogitsProcessor]:
        """See `make_logits_processors`."""
        return make_logits_processors(
            self.logit_bias,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )


@dataclass(frozen=True)
class Sampler:
    """Draws one token a row from logits [B, V].

    Attributes:
        temp: temperature; 0 takes the likeliest token.
        top_p: keeps the fewest tokens whose probabilities sum to this; 1 (or 0) keeps all.
        min_p: keeps tokens at least this likely relative to the likeliest; 0 keeps all.
        top_k: keeps this many of the likeliest tokens; 0 keeps all.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0

    def __post_init__(self) -> None:
        check_number("temp", self.temp, 0, TEMPERATURE_LIMIT)
        check_number("top_p", self.top_p, 0, 1)
        check_number("min_p", self.min_p, 0, 1)
        check_whole("top_k", self.top_k, 0, TOP_K_LIMIT)

    def __call__(self, logits: mx.array, key: mx.array | None = None) -> mx.array:
        """Tokens [B] for logits or log-probabilities [B, V]; `key` is a random key, by default MLX's global state."""
        if self.temp == 0:
            return mx.argmax(logits, axis=-1)
        logits = logits.astype(mx.float32) / max(self.temp, _MIN_TEMP)
        if 0 < self.top_k < logits.shape[-1]:
            tokens = mx.argpartition(-logits, self.top_k - 1, axis=-1)[..., : self.top_k]
            drawn = self._draw(mx.take_along_axis(logits, tokens, axis=-1), key)
            return mx.take_along_axis(tokens, drawn[..., None], axis=-1)[..., 0]
        return self._draw(logits, key)

    def _draw(self, logits: mx.array, key: mx.array | None) -> mx.array:
        """Tokens [B] for tempered logits [B, V]."""
        if self.min_p > 0:
            floor = mx.max(logits, axis=-1, keepdims=True) + math.log(self.min_p)
            allowed = mx.where(logits < floor, -math.inf, logits)
        else:
            allowed = logits
        if not 0 < self.top_p < 1:
            return mx.random.categorical(allowed, key=key)
        tries = _MISS / math.log1p(-self.top_p)
        if tries <= _MAX_TRIES and logits.shape[-1] > _BLOCK:
            return _draw_from_nucleus(logits, allowed, self.top_p, math.ceil(tries), key)
        return _draw_sorted(logits, allowed, self.top_p, key)


def make_sampler(
    temp: float = 0.0, top_p: float = 1.0, min_p: float = 0.0, top_k: int = 0, seed: int | None = None
) -> Draw:
    """A sampler for `generate_step`: logits [B, V] -> tokens [B].

    Args:
        temp: temperature, from 0 (greedy).
        top_p: probability mass to keep, 0 to 1.
        min_p: least probability relative to the likeliest token's, 0 to 1.
        top_k: number of tokens to keep; 0 keeps all.
        seed: makes the draws repeatable, whatever else draws random numbers.

    Raises:
        RequestError: a value is not a number, or is outside its range.
    """
    sampler = Sampler(temp, top_p, min_p, top_k)
    if seed is None:
        return sampler
    check_whole("seed", seed, 0, SEED_LIMIT)
    key = mx.random.key(seed)

    def seeded(logits: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        return sampler(logits, now)

    return seeded


def make_logits_processors(
    logit_bias: Mapping[int, float] | None = None,
    repetition_penalty: float | None = None,
    repetition_context_size: int = 20,
    presence_penalty: float | None = None,
    presence_context_size: int = 20,
    frequency_penalty: float | None = None,
    frequency_context_size: int = 20,
) -> list[LogitsProcessor]:
    """Logits processors, in mlx-lm's names.

    Args:
        logit_bias: token id -> amount added to its logit.
        repetition_penalty: divides positive logits of recent tokens and multiplies negative ones; 1 has no effect.
        repetition_context_size: number of recent tokens that count; likewise for the next two.
        presence_penalty: subtracted once from the logit of each recent token.
        presence_context_size: as above.
        frequency_penalty: subtracted from the logit of each recent token once for each occurrence.
        frequency_context_size: as above.

    Raises:
        RequestError: a value is not a number, or is outside its range.
    """
    processors: list[LogitsProcessor] = []
    if logit_bias:
        processors.append(_bias(logit_bias))
    if repetition_penalty is not None:
        check_number("repetition_penalty", repetition_penalty, *REPETITION_PENALTY_RANGE)
        processors.append(_recent(repetition_context_size, "repetition_context_size", _repetition(repetition_penalty)))
    if presence_penalty is not None:
        check_number("presence_penalty", presence_penalty, *PENALTY_RANGE)
        presence = _subtract(presence_penalty, lambda counts: counts > 0)
        processors.append(_recent(presence_context_size, "presence_context_size", presence))
    if frequency_penalty is not None:
        check_number("frequency_penalty", frequency_penalty, *PENALTY_RANGE)
        frequency = _subtract(frequency_penalty, lambda counts: counts)
        processors.append(_recent(frequency_context_size, "frequency_context_size", frequency))
    return processors


def _draw_sorted(logits: mx.array, allowed: mx.array, top_p: float, key: mx.array | None) -> mx.array:
    """Tokens [B] from the fewest logits [B, V] whose probability reaches top_p, restricted to the allowed ones."""
    order = mx.argsort(-logits, axis=-1)
    probs = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1, precise=True)
    before = mx.cumsum(probs, axis=-1) - probs  # mass of all likelier tokens
    nucleus = mx.where(before < top_p, mx.take_along_axis(allowed, order, axis=-1), -math.inf)
    drawn = mx.random.categorical(nucleus, key=key)
    return mx.take_along_axis(order, drawn[..., None], axis=-1)[..., 0]


def _draw_from_nucleus(
    logits: mx.array, allowed: mx.array, top_p: float, tries: int, key: mx.array | None
) -> mx.array:
    """`_draw_sorted` without the sort.

    A token drawn from the whole vocabulary lies in the nucleus if the likelier tokens sum to less than top_p, which has
    a probability of top_p or more. Several are drawn at once, and the first in the nucleus is taken. Equally likely
    tokens are ordered by id.
    """
    probs = mx.softmax(logits, axis=-1)
    weights = probs if allowed is logits else mx.where(allowed == -math.inf, 0.0, probs)
    drawn = _draw_by_weight(weights, tries, key)  # [B, N]
    own = mx.take_along_axis(probs, drawn, axis=-1)
    inside = _mass_before(probs[:, None], own[..., None], drawn[..., None]) < top_p
    first = mx.argmax(inside, axis=-1, keepdims=True)
    lucky = mx.take_along_axis(drawn, first, axis=-1)[:, 0]
    return mx.where(mx.any(inside, axis=-1), lucky, mx.argmax(logits, axis=-1))


@compiled
def _mass_before(probs: mx.array, own: mx.array, token: mx.array) -> mx.array:
    """Probability mass of all tokens [.., V] likelier than one; equally likely tokens are ordered by id."""
    ids = mx.arange(probs.shape[-1])
    before = (probs > own) | ((probs == own) & (ids < token))
    return mx.where(before, probs, 0.0).sum(axis=-1)


def _draw_by_weight(weights: mx.array, n: int, key: mx.array | None) -> mx.array:
    """Draws n tokens [B, n] by weights [B, V]: first a block of ids, then one within it, which loses no precision."""
    B, V = weights.shape
    blocks = mx.pad(weights, [(0, 0), (0, -V % _BLOCK)]).reshape(B, -1, _BLOCK)
    at, within = mx.random.uniform(shape=(2, B, n, 1), key=key)
    totals = mx.cumsum(blocks.sum(axis=-1), axis=-1)[:, None]  # [B, 1, V / block]
    block = mx.minimum((totals <= at * totals[..., -1:]).sum(axis=-1), blocks.shape[1] - 1)  # [B, n]
    inside = mx.cumsum(mx.take_along_axis(blocks, block[..., None], axis=1), axis=-1)  # [B, n, block]
    offset = (inside <= within * inside[..., -1:]).sum(axis=-1)
    return mx.minimum(block * _BLOCK + offset, V - 1)


def _bias(logit_bias: Mapping[int, float]) -> LogitsProcessor:
    for token, bias in logit_bias.items():
        check_whole("logit_bias token", token, 0)
        check_number(f"logit_bias of token {token}", bias, -1000, 1000)
    tokens, biases = mx.array(list(logit_bias)), mx.array(list(logit_bias.values()), mx.float32)

    def add(_: mx.array, logits: mx.array) -> mx.array:
        if max(logit_bias) >= logits.shape[-1]:
            raise RequestError(f"logit_bias token {max(logit_bias)} is outside the vocabulary of {logits.shape[-1]}")
        return logits.at[:, tokens].add(biases.astype(logits.dtype))

    return add


def _recent(size: int, name: str, change: Callable[[mx.array, mx.array], mx.array]) -> LogitsProcessor:
    """Applies `change(counts [V], logits)` with the counts of the last `size` tokens."""
    check_whole(name, size, 1)

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        counts = mx.zeros(logits.shape[-1]).at[tokens[-size:]].add(1)
        return change(counts, logits)

    return process


def _repetition(penalty: float) -> Callable[[mx.array, mx.array], mx.array]:
    def change(counts: mx.array, logits: mx.array) -> mx.array:
        return mx.where(counts > 0, mx.where(logits > 0, logits / penalty, logits * penalty), logits)

    return change


def _subtract(penalty: float, weight: Callable[[mx.array], mx.array]) -> Callable[[mx.array, mx.array], mx.array]:
    return lambda counts, logits: logits - (penalty * weight(counts)).astype(logits.dtype)

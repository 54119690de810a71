"""Samplers map logits to tokens; logits processors change the logits before that.

The order is the reference's: penalties and bias, temperature, then top-k, top-p and min-p, each on the tempered logits,
so that a cut-off applies to the distribution that is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import mlx.core as mx

from phi4_mlx.errors import RequestError, check_number, check_whole
from phi4_mlx.models.compiled import compiled
from phi4_mlx.models.split_logits import likeliest
from phi4_mlx.terminal.limits import PENALTY_RANGE, REPETITION_PENALTY_RANGE, SEED_LIMIT, TEMPERATURE_LIMIT, TOP_K_LIMIT

_MISS = math.log(2**-32)  # log of the accepted probability that no draw of several lies in the nucleus
_MAX_TRIES = 16  # at a top_p of 0.75; below that, sorting is as fast
_LONG = 512  # token ids, from which a sort takes longer than the tries
_MIN_TEMP = 1e-30  # keeps logits finite in float32; far above it, only the likeliest token is ever drawn

Draw = Callable[[mx.array], mx.array]  # logits or log-probabilities [n, V] -> tokens [n]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]  # (tokens so far [S], logits [1, V]) -> logits [1, V]


@dataclass(frozen=True)
class Processor:
    """A logits processor under which each logit grows with the given one, and depends on no other."""

    process: LogitsProcessor

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits [1, V], of logits [1, V] and the tokens so far [S]."""
        return self.process(tokens, logits)


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
        return self.choose(self.tempered(logits), self.noise(logits.shape, key))

    def tempered(self, logits: mx.array) -> mx.array:
        """Logits over the temperature, in float32."""
        return logits.astype(mx.float32) / self.divisor

    @property
    def divisor(self) -> float:
        """The temperature, far enough above 0 to divide by."""
        return max(self.temp, _MIN_TEMP)

    def noise(self, shape: tuple[int, ...], key: mx.array | None) -> mx.array:
        """Random numbers that `choose` adds to logits of this shape, [B, V]; [B, top_k] where that many are kept."""
        B, V = shape
        return mx.random.gumbel((B, self.top_k if 0 < self.top_k < V else V), key=key)

    def choose(self, logits: mx.array, noise: mx.array) -> mx.array:
        """Tokens [B]: of the tempered logits [B, V] that are kept, the largest with its noise."""
        if logits.shape == noise.shape:
            return self._choose(logits, noise)
        tokens = self.largest(logits)
        drawn = self._choose(mx.take_along_axis(logits, tokens, axis=-1), noise)
        return mx.take_along_axis(tokens, drawn[..., None], axis=-1)[..., 0]

    def largest(self, logits: mx.array) -> mx.array:
        """The `top_k` likeliest tokens [B, top_k], of equal ones the first, in the order of their ids."""
        return mx.sort(likeliest(logits, self.top_k), axis=-1)

    def allowed(self, logits: mx.array) -> mx.array:
        """Tempered logits, -inf where `min_p` cuts them off."""
        if self.min_p == 0:
            return logits
        floor = mx.max(logits, axis=-1, keepdims=True) + math.log(self.min_p)
        return mx.where(logits < floor, -math.inf, logits)

    @property
    def has_nucleus(self) -> bool:
        """True if `top_p` cuts tokens off."""
        return 0 < self.top_p < 1

    def _choose(self, logits: mx.array, noise: mx.array) -> mx.array:
        """`choose` without `top_k`."""
        allowed = self.allowed(logits)
        if not self.has_nucleus:
            return mx.argmax(allowed + noise, axis=-1)
        tries = _MISS / math.log1p(-self.top_p)
        if tries <= _MAX_TRIES and logits.shape[-1] > _LONG:
            return _choose_in_nucleus(logits, allowed + noise, self.top_p, math.ceil(tries))
        return _choose_sorted(logits, allowed + noise, self.top_p)


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
    return SeededSampler(sampler, mx.random.key(seed))


@dataclass
class SeededSampler:
    """A sampler with random numbers of its own: each call takes the next key."""

    sampler: Sampler
    key: mx.array

    def __call__(self, logits: mx.array) -> mx.array:
        """Tokens [B] for logits [B, V]."""
        return self.sampler(logits, self.next_key())

    def next_key(self) -> mx.array:
        """The random key of the next draw."""
        self.key, key = mx.random.split(self.key)
        return key


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
        processors.append(Processor(_bias(logit_bias)))
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


def _choose_sorted(logits: mx.array, scores: mx.array, top_p: float) -> mx.array:
    """Tokens [B] with the largest scores [B, V] among the fewest logits [B, V] whose probability reaches top_p."""
    order = mx.argsort(-logits, axis=-1)
    probs = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1, precise=True)
    before = mx.cumsum(probs, axis=-1) - probs  # mass of all likelier tokens
    kept = mx.where(before < top_p, mx.take_along_axis(scores, order, axis=-1), -math.inf)
    return mx.take_along_axis(order, mx.argmax(kept, axis=-1, keepdims=True), axis=-1)[..., 0]


def _choose_in_nucleus(logits: mx.array, scores: mx.array, top_p: float, tries: int) -> mx.array:
    """`_choose_sorted` without the sort of all logits.

    The token with the largest score lies in the nucleus if the likelier tokens sum to less than top_p, which has a
    probability of top_p or more; so does the next one, if it does not. The first of several in the nucleus is taken.
    Equally likely tokens are ordered by id.
    """
    probs = mx.softmax(logits, axis=-1)
    drawn = likeliest(scores, tries)  # [B, N]
    drawn = mx.take_along_axis(drawn, mx.argsort(-mx.take_along_axis(scores, drawn, axis=-1), axis=-1), axis=-1)
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

    return Processor(process)


def _repetition(penalty: float) -> Callable[[mx.array, mx.array], mx.array]:
    def change(counts: mx.array, logits: mx.array) -> mx.array:
        return mx.where(counts > 0, mx.where(logits > 0, logits / penalty, logits * penalty), logits)

    return change


def _subtract(penalty: float, weight: Callable[[mx.array], mx.array]) -> Callable[[mx.array, mx.array], mx.array]:
    return lambda counts, logits: logits - (penalty * weight(counts)).astype(logits.dtype)

"""The effect of an adapter on a model's answers, and how much of it another model keeps.

The reference answers are the adapter's greedy ones. A model that gets such an answer as its own past, and finds each of
its tokens the likeliest, gives that answer, so one pass measures a whole answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.model import LanguageModel

ANSWER_TOKENS = {True: 64, False: 12}
"""Most tokens of an answer to a prompt of the adapter's own data, and to another one."""

KEPT = 0.97  # the share of the effect that must be kept
KEPT_UNSEEN = 0.99  # the same where no prompt is from the adapter's own data, whose answers are not looked at then
NOISE = {mx.float32: 1e-5}
"""Nats per token that the arithmetic alone makes, by the model's dtype; `HALF_NOISE` for half precision."""
HALF_NOISE = 1e-4
_LIKELIEST = 64  # tokens whose probabilities are compared; all others count as one


@dataclass(frozen=True, eq=False)
class Probe:
    """A prompt with the answer of a model and its adapter.

    Attributes:
        ids: prompt and answer.
        start: the index of the answer's first token.
        own: True if the prompt is from the adapter's own data.
        tokens: the likeliest tokens at each place of the answer, [N, K].
        log_probs: their log-probabilities and that of all others together, fp32 [N, K + 1].
        change: the adapter's effect: the KL divergence from the base, in nats, summed over the answer.
        base_token: (place, token) at which the base first prefers another token; None if it gives the same answer.
    """

    ids: list[int]
    start: int
    own: bool
    tokens: mx.array
    log_probs: mx.array
    change: float
    base_token: tuple[int, int] | None


@dataclass(frozen=True)
class Effect:
    """The part of an adapter's effect that a model keeps.

    Attributes:
        own: number of prompts from the adapter's own data.
        prompts: number of all prompts.
        changed: number of prompts that the adapter answers differently from the base.
        as_adapter: number of those that the model answers as base and adapter do.
        as_base: number of those that the model answers as the base does, up to its first token that differs.
        own_lost: number of changed prompts of the adapter's own data with another answer than the adapter's.
        kept: 1 if the probabilities are those of base and adapter, 0 if they are as far from them as the base's.
        keeps: True if the fine-tune is kept: no own answer is lost, of the others not more than half are the base's
            again, and `KEPT` or `KEPT_UNSEEN` of the effect on probabilities is there.
    """

    own: int
    prompts: int
    changed: int
    as_adapter: int
    as_base: int
    own_lost: int
    kept: float
    keeps: bool


def make_probes(
    base: LanguageModel, tuned: LanguageModel, prompts: Iterable[tuple[list[int], bool]], ends: frozenset[int]
) -> Iterator[Probe]:
    """Answers prompts with a model and its adapter, and compares with the base.

    Args:
        base: the model without the adapter.
        tuned: the model with it.
        prompts: (ids, True if they are from the adapter's own data).
        ends: the ids that end an answer.
    """
    for prompt, own in prompts:
        ids = list(prompt)
        for token, _ in generate_step(prompt, tuned, max_tokens=ANSWER_TOKENS[own]):
            ids.append(token)
            if token in ends:
                break
        now, before = (_answer_log_probs(model, ids, len(prompt)) for model in (tuned, base))
        tokens = mx.argpartition(-now, min(_LIKELIEST, now.shape[1] - 1), axis=-1)[:, :_LIKELIEST]
        log_probs = _coarse(now, tokens)
        change = _divergence(log_probs, _coarse(before, tokens))
        yield Probe(ids, len(prompt), own, tokens, log_probs, change, _first_other(before, ids[len(prompt) :]))


def measure(
    model: LanguageModel, probes: Sequence[Probe], progress: Callable[[int, int], object] = lambda done, total: None
) -> Effect:
    """Measures how much of the effect a model keeps.

    Args:
        model: such as a fused package.
        probes: from `make_probes`.
        progress: called with (probes done, all probes).
    """
    own = prompts = changed = as_adapter = as_base = own_lost = places = 0
    lost = change = 0.0
    noise = NOISE.get(model.dtype, HALF_NOISE)
    for probe in probes:
        answer = probe.ids[probe.start :]
        found = _answer_log_probs(model, probe.ids, probe.start)
        other = _first_other(found, answer)
        progress(prompts + 1, len(probes))
        prompts, own, places = prompts + 1, own + probe.own, places + len(answer)
        lost += _divergence(probe.log_probs, _coarse(found, probe.tokens))
        change += probe.change
        if probe.base_token is not None:
            changed += 1
            as_adapter += other is None
            as_base += other == probe.base_token
            own_lost += probe.own and other is not None
    least = KEPT if own else KEPT_UNSEEN
    keeps = not own_lost and as_base <= as_adapter and lost <= (1 - least) * change + noise * places
    kept = 1 - lost / max(change, noise * places)
    return Effect(own, prompts, changed, as_adapter, as_base, own_lost, kept, keeps)


def log_probs(model: LanguageModel, ids: mx.array, rows: int) -> mx.array:
    """Log-probabilities of the token after each of the last `rows` ids.

    Args:
        model: the model.
        ids: [B, T].
        rows: N, at most T.

    Returns:
        fp32 [B, N, V].
    """
    logits = model.logits(model.hidden(ids, rows=rows)).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _answer_log_probs(model: LanguageModel, ids: list[int], start: int) -> mx.array:
    """Log-probabilities of each token from `start`, given all tokens before it: fp32 [N, V]."""
    return log_probs(model, mx.array([ids[:-1]]), len(ids) - start)[0]


def _coarse(log_probs: mx.array, tokens: mx.array) -> mx.array:
    """Log-probabilities of some tokens and of all others together, [N, K + 1]."""
    some = mx.take_along_axis(log_probs, tokens, axis=-1)
    rest = mx.maximum(1 - mx.exp(some).sum(axis=-1, keepdims=True), 1e-9)
    return mx.concatenate([some, mx.log(rest)], axis=-1)


def _divergence(expected: mx.array, found: mx.array) -> float:
    """KL divergence in nats, summed over all places."""
    return max(0.0, float((mx.exp(expected) * (expected - found)).sum().item()))


def _first_other(log_probs: mx.array, answer: list[int]) -> tuple[int, int] | None:
    """(place, token) at which a model first prefers a token that is not the answer's; None if it never does."""
    likeliest: list[int] = log_probs.argmax(axis=-1).tolist()
    return next(
        ((at, token) for at, (token, wanted) in enumerate(zip(likeliest, answer, strict=True)) if token != wanted), None
    )

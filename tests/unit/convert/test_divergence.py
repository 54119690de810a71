"""KL through a head in blocks equals KL of whole logits."""

from __future__ import annotations

import mlx.core as mx
import pytest

from phi4_mlx.convert.divergence import Reference
from phi4_mlx.errors import RequestError

TOKENS, WIDTH, VOCABULARY = 7, 16, 50


def random(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def log_probs(hidden: mx.array, head: mx.array) -> mx.array:
    logits = hidden @ head.T
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("step", [1, 13, VOCABULARY])
def test_blocks_of_a_head_give_the_kl_of_whole_logits(step: int) -> None:
    hidden, changed = random(TOKENS, WIDTH, seed=0), random(TOKENS, WIDTH, seed=1)
    head, other = random(VOCABULARY, WIDTH, seed=2), random(VOCABULARY, WIDTH, seed=3)

    def blocks(rows: mx.array) -> list[mx.array]:
        return [rows[first : first + step] for first in range(0, VOCABULARY, step)]

    reference = Reference(hidden, lambda: blocks(head))
    for theirs, used in ((None, head), (lambda: blocks(other), other)):
        exact, found = log_probs(hidden, head), log_probs(changed, used)
        expected = (mx.exp(exact) * (exact - found)).sum(axis=-1).mean().item()
        assert reference.divergence(changed, theirs) == pytest.approx(expected, rel=1e-4)
    assert reference.divergence(hidden) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [mx.nan, mx.inf])
def test_a_divergence_that_is_not_finite_is_not_taken_for_none(bad: float) -> None:
    hidden, head = random(TOKENS, WIDTH, seed=0), random(VOCABULARY, WIDTH, seed=2)
    with pytest.raises(RequestError, match="NaN or infinite"):
        Reference(hidden, lambda: [head]).divergence(mx.where(mx.arange(WIDTH) == 3, bad, hidden))

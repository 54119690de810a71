"""The chunked loss: equality with the whole logits, gradients included, and memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.lora.training import loss as module
from phi4_mlx.lora.training.loss import next_token_loss, token_losses
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.text import Model


def naive_loss(
    model: Model, inputs: mx.array, targets: mx.array, mask: mx.array, segments: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """The obvious code."""
    logits = model.logits(model.hidden(inputs, segments=segments)).astype(mx.float32)
    return (nn.losses.cross_entropy(logits, targets) * mask).sum() / mask.sum(), mask.sum()


def batch(seed: int, B: int = 3, T: int = 120, share: float = 0.7) -> tuple[mx.array, mx.array, mx.array]:
    a, b, c = mx.random.split(mx.random.key(seed), 3)
    mask = mx.random.uniform(shape=(B, T), key=c) < share
    return mx.random.randint(0, 512, (B, T), key=a), mx.random.randint(0, 512, (B, T), key=b), mask


def both(model: Model, *arrays: Any) -> tuple[list[mx.array], dict[str, mx.array], dict[str, mx.array]]:
    """(losses and counts of both codes), our gradients, gradients of the obvious code."""
    (ours, n), our_grads = nn.value_and_grad(model, next_token_loss)(model, *arrays)
    (theirs, m), their_grads = nn.value_and_grad(model, naive_loss)(model, *arrays)
    return [ours, theirs, n, m], dict(tree_flatten(our_grads)), dict(tree_flatten(their_grads))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_loss_and_gradients_are_those_of_the_whole_logits(
    tiny_model: Callable[..., Model], tied: bool, frozen: bool
) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    if frozen:
        (model.model.embed_tokens if tied else model.lm_head).freeze()
    (ours, theirs, n, m), our_grads, their_grads = both(model, *batch(1))
    assert abs(ours.item() - theirs.item()) < 1e-5 and n.item() == m.item() > 0
    assert our_grads.keys() == their_grads.keys()
    for name, expected in their_grads.items():
        assert mx.abs(our_grads[name] - expected).max().item() < 1e-5, name
    assert max(mx.abs(grad).max().item() for grad in their_grads.values()) > 0.01


def test_a_quantised_head_gives_the_same_gradients(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    model.freeze()
    nn.quantize(model.model, group_size=32, bits=8, class_predicate=lambda path, _: path == "embed_tokens")
    model.model.layers[0].unfreeze()
    (ours, theirs, _, _), our_grads, their_grads = both(model, *batch(2))
    assert abs(ours.item() - theirs.item()) < 1e-5
    assert all(mx.abs(our_grads[name] - their_grads[name]).max().item() < 1e-5 for name in their_grads)


@pytest.mark.parametrize("recompute", [False, True])
def test_packed_rows_are_the_sum_over_their_samples(any_model: Callable[..., LanguageModel], recompute: bool) -> None:
    """Also across the RoPE boundary (64), and with each block run again in backward."""
    model = any_model()
    model.head.freeze()
    model.recompute = recompute
    inputs, targets, mask = batch(3, B=1, T=170)
    ends = [0, 20, 100, 101, 170]
    spans = list(pairwise(ends))
    numbers = [mx.full((b - a,), at, mx.int32) for at, (a, b) in enumerate(spans, 1)]
    grad = nn.value_and_grad(model, next_token_loss)
    (loss, count), grads = grad(model, inputs, targets, mask, mx.concatenate(numbers)[None])
    total, sums = mx.array(0.0), {name: mx.zeros_like(g) for name, g in tree_flatten(grads)}
    for a, b in spans:
        (one, n), own = grad(model, inputs[:, a:b], targets[:, a:b], mask[:, a:b])
        total = total + one * n
        for name, g in tree_flatten(own):
            sums[name] = sums[name] + g * n
    assert abs(loss.item() - (total / count).item()) < 1e-5
    for name, g in tree_flatten(grads):
        assert mx.abs(g - sums[name] / count).max().item() < 1e-5, name


def test_running_blocks_again_changes_no_bit(any_model: Callable[..., LanguageModel]) -> None:
    model = any_model(num_hidden_layers=8).train()
    grad = nn.value_and_grad(model, next_token_loss)

    def run() -> tuple[Any, int]:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        result = grad(model, *batch(4))
        mx.eval(result)
        return result, mx.get_peak_memory() - before

    kept, kept_bytes = run()
    model.recompute = True
    again, again_bytes = run()
    assert again_bytes < 0.6 * kept_bytes
    assert mx.array_equal(kept[0][0], again[0][0])
    assert all(
        mx.array_equal(a, b) for (_, a), (_, b) in zip(tree_flatten(kept[1]), tree_flatten(again[1]), strict=True)
    )


def test_each_token_may_weigh_differently(tiny_model: Callable[..., Model]) -> None:
    """Preference losses need gradients of any function of the tokens' losses."""
    model = tiny_model()
    model.model.embed_tokens.freeze()
    hidden, weights = mx.random.normal((90, 96), key=mx.random.key(5)), mx.arange(90) / 90 - 0.3
    targets = mx.random.randint(0, 512, (90,), key=mx.random.key(6))

    def ours(hidden: mx.array) -> mx.array:
        return mx.tanh(token_losses(model, hidden, targets) * weights).sum()

    def theirs(hidden: mx.array) -> mx.array:
        return mx.tanh(nn.losses.cross_entropy(model.logits(hidden), targets) * weights).sum()

    assert mx.allclose(mx.grad(ours)(hidden), mx.grad(theirs)(hidden), rtol=0, atol=1e-5)


def test_no_target_is_no_loss_and_never_nan(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    inputs, targets, mask = batch(7)
    (loss, count), grads = nn.value_and_grad(model, next_token_loss)(model, inputs, targets, mask & False)
    assert loss.item() == 0 and count.item() == 0
    assert all((g == 0).all().item() for _, g in tree_flatten(grads))


def test_positions_that_are_no_target_cost_no_head(
    tiny_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    head = Model.logits
    monkeypatch.setattr(Model, "logits", lambda self, hidden: (rows.append(len(hidden)), head(self, hidden))[1])
    model = tiny_model()
    inputs, targets, mask = batch(8, share=0.1)
    next_token_loss(model, inputs, targets, mask)
    assert sum(rows) == mask.sum().item() < 60


@pytest.mark.slow
def test_memory_is_that_of_a_few_chunks(tiny_model: Callable[..., Model]) -> None:
    vocabulary, tokens = 20_000, 640
    model = tiny_model(vocab_size=vocabulary, num_hidden_layers=1)
    model.freeze()
    model.model.norm.unfreeze()
    inputs, targets = (mx.random.randint(0, vocabulary, (1, tokens), key=mx.random.key(n)) for n in (1, 2))
    mask = mx.ones((1, tokens), mx.bool_)

    def peak(loss: Callable[..., Any]) -> int:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(nn.value_and_grad(model, loss)(model, inputs, targets, mask))
        return mx.get_peak_memory() - before

    logits_bytes = 4 * vocabulary * tokens
    assert peak(naive_loss) > 3 * logits_bytes
    assert peak(next_token_loss) < 12 * module.CHUNK_ROWS / tokens * logits_bytes + 20e6

"""The lessons of a tower: conversations about a medium, and updates of the tower, its projection and its LoRA.

The decoder under the LoRA is the frozen one of `demo`, with the numbers of its 4-bit package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from asked import Question
from cpu_math import cross_entropy

from phi4_mlx import Model, Tokenizer, load
from phi4_mlx.adapters.layers import add_adapter

RANK, SCALE = 32, 2.0  # the scale is the real model's alpha / rank
WARMUP_STEPS = 50

Lesson = tuple[Any, ...]
"""The arrays of one batch, and whole numbers that choose a compiled step."""


def frozen_decoder(seed: int) -> tuple[Model, Tokenizer]:
    """The model of `demo`, dequantised, with a new LoRA on every linear layer of its blocks; all else is frozen."""
    model, tokenizer = load("demo")
    for path, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            weight = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
            is_table = isinstance(module, nn.QuantizedEmbedding)
            dense = nn.Embedding(*weight.shape) if is_table else nn.Linear(*weight.T.shape, bias=False)
            dense.weight = weight
            _replace(model, path, dense)
    add_adapter(model, rank=RANK, scale=SCALE, seed=seed)
    model.train()
    return model, tokenizer


def _replace(model: Any, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        model = model[int(parent)] if isinstance(model, list) else model[parent]
    model[name] = module


class Student(nn.Module):
    """A tower with its projection, and the decoder with its LoRA."""

    def __init__(self, tower: nn.Module, decoder: Model):
        super().__init__()
        self.tower, self.decoder = tower, decoder

    def loss(self, rows: mx.array, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        """(mean loss, share of right tokens) of conversations whose slots begin at position 1.

        Args:
            rows: [B, n, D], of the medium.
            ids: [B, T + 1].
            weights: [B, T + 1], 1 for tokens of answers, else 0.
        """
        table = self.decoder.model.embed_tokens.weight
        x = table[ids[:, :-1]]
        x = mx.concatenate([x[:, :1], rows, x[:, 1 + rows.shape[1] :]], axis=1)
        logits = self.decoder.logits(self.decoder.hidden(ids[:, :-1], embeddings=x))
        losses, right = cross_entropy(logits, ids[:, 1:]), logits.argmax(-1) == ids[:, 1:]
        weights = weights[:, 1:]
        return (losses * weights).sum() / weights.sum(), (right * weights).sum() / weights.sum()


def conversation(
    tokenizer: Tokenizer, slots: int, questions: Iterable[Question], width: int
) -> tuple[list[int], list[float]]:
    """(ids, weights) [width + 1] of a conversation with as many of the questions as fit, padded on the right."""
    user, assistant, end, pad = (
        tokenizer.control_ids[text] for text in ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
    )
    ids, weights = [user, *[pad] * slots], [0.0] * (slots + 1)
    for question in questions:
        asked = [user] * (len(ids) > slots + 1) + tokenizer.encode(question.text) + [end, assistant]
        answered = [*tokenizer.encode(question.answer), end]
        if len(ids) + len(asked) + len(answered) <= width + 1:
            ids += asked + answered
            weights += [0.0] * len(asked) + [1.0] * len(answered)
    missing = width + 1 - len(ids)
    return ids + [pad] * missing, weights + [0.0] * missing


@dataclass(frozen=True)
class Stage:
    """A part of the training on conversations.

    Attributes:
        most: the most shapes in a picture, or words in a clip.
        steps: number of updates.
        rows: conversations in a batch.
        width: tokens of a conversation.
        rate: the highest learning rate.
    """

    most: int
    steps: int
    rows: int
    width: int
    rate: float


def stacked(rows: Sequence[tuple[list[int], list[float]]]) -> tuple[mx.array, mx.array]:
    """Ids and weights of conversations of one width."""
    return mx.array(np.array([ids for ids, _ in rows])), mx.array(
        np.array([weights for _, weights in rows], np.float32)
    )


def study(
    module: nn.Module,
    loss: Callable[..., tuple[mx.array, mx.array]],
    lessons: Iterable[Lesson],
    steps: int,
    rate: float,
    name: str,
) -> None:
    """Updates the trainable parameters of a module, one lesson a step.

    Args:
        module: what is trained.
        loss: the arrays of a lesson -> (loss, share of right answers).
        lessons: at least `steps`.
        steps: number of updates.
        rate: the highest learning rate.
        name: of the lines that are printed.
    """
    warm = optim.linear_schedule(rate / 50, rate, WARMUP_STEPS)
    cool = optim.cosine_decay(rate, max(1, steps - WARMUP_STEPS), rate / 50)
    optimizer = optim.AdamW(optim.join_schedules([warm, cool], [WARMUP_STEPS]), betas=[0.9, 0.98], weight_decay=0.02)
    optimizer.init(module.trainable_parameters())

    def of(parameters: Any, *lesson: Any) -> tuple[mx.array, mx.array]:
        module.update(parameters)
        return loss(*lesson)

    @partial(mx.compile, inputs=[module.state, optimizer.state], outputs=[module.state, optimizer.state])
    def step(*lesson: Any) -> tuple[mx.array, mx.array]:
        parameters = module.trainable_parameters()
        found, grads = mx.value_and_grad(of)(parameters, *lesson)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        module.update(optimizer.apply_gradients(grads, parameters))
        return found

    start, recent = time.perf_counter(), np.zeros(2)
    for number, lesson in zip(range(1, steps + 1), lessons, strict=False):
        found = step(*lesson)
        mx.eval(found, module.state, optimizer.state)
        recent += [value.item() for value in found]
        if number % 50 == 0 or number == steps:
            value, right = recent / (number % 50 or 50)
            minutes = (time.perf_counter() - start) / 60
            print(f"{name} {number}/{steps}  loss {value:.3f}  right {right:.3f}  {minutes:.1f} min", flush=True)
            recent[:] = 0

"""Checks of training: the loss, its gradient, and a step of LoRA."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from phi4_mlx.adapters.layers import add_adapter
from phi4_mlx.checkpoint import empty_model, read_config
from phi4_mlx.doctor.check import Check
from phi4_mlx.doctor.forward import Subject, allowed_of, ids
from phi4_mlx.doctor.operations import random
from phi4_mlx.doctor.tolerance import exponentials, rounding
from phi4_mlx.hub import resolve
from phi4_mlx.lora.training.batches import Batch
from phi4_mlx.lora.training.loss import TRAINED_CHUNK_ROWS, sft_loss, token_losses

LENGTHS = 20, 30  # tokens of the samples packed in a row
PASSES = 3  # operations in backward, of which each has two, beside those in forward


def learning_checks() -> list[Check]:
    """The checks of this file."""
    found = []
    for name in ("demo", "demo-flash"):
        subject = Subject(name, resolve(name))
        found.append(
            Check(
                f"{name}: LoRA step and its gradient", subject.paths("loss", "recompute"),
                partial(_lora_step, subject), allowed_of(subject, PASSES),
            )
        )  # fmt: skip
    allowed = rounding(mx.float32, TRAINED_CHUNK_ROWS, 6) + exponentials(2)
    return [*found, Check("loss with a trained head", ("loss", "products"), _trained_head, allowed)]


def _lora_step(subject: Subject) -> list[mx.array]:
    """The loss and its gradient, and the loss after an update that follows from it."""
    model = subject.load().train()
    add_adapter(model, rank=4)
    drawn = {
        name: 0.03 * random(number, *array.shape)
        for number, (name, array) in enumerate(sorted(tree_flatten(model.trainable_parameters())))
    }
    model.load_weights([*drawn.items()], strict=False)
    model.recompute = True
    batch = _packed(ids(sum(LENGTHS) + 1, model))
    (loss, _), gradients = nn.value_and_grad(model, sft_loss)(model, batch)
    flat = [array for _, array in sorted(tree_flatten(gradients))]
    optim.AdamW(1e-3, bias_correction=True).update(model, gradients)
    after, _ = sft_loss(model, batch)
    return [loss, *flat, after]


def _packed(row: list[int]) -> Batch:
    """A row of two samples."""
    segments = np.repeat(np.arange(1, len(LENGTHS) + 1), LENGTHS)[None].astype(np.int32)
    mask = np.ones((1, sum(LENGTHS)), bool)
    mask[0, : LENGTHS[0] // 2] = False
    return Batch(mx.array([row[:-1]]), mx.array([row[1:]]), mx.array(mask), mx.array(segments))


def _trained_head() -> list[mx.array]:
    """Losses over more rows than a chunk, and the gradients of the hidden states and of the head."""
    V, D, N = 128, 32, TRAINED_CHUNK_ROWS + 20
    raw = {
        "model_type": "phi3", "hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": V, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }  # fmt: skip
    model = empty_model(read_config(raw), {})
    model.head.update({"weight": random(1, V, D)})
    targets = mx.array(ids(N, model))

    def loss(weight: mx.array, hidden: mx.array) -> mx.array:
        model.head.update({"weight": weight})
        return (token_losses(model, hidden, targets) * random(3, N)).sum()

    hidden = random(2, N, D)
    gradients = mx.grad(loss, argnums=(0, 1))(model.head.weight, hidden)
    model.head.update({"weight": random(1, V, D)})
    return [token_losses(model, hidden, targets), *gradients]

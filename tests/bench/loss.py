"""What the loss of a batch takes beside mlx-lm's: peak memory and time, at the true vocabulary.

    python tests/bench/loss.py

First the loss with its gradient, 1,024 tokens, the head frozen as in LoRA; then a whole training step of 32 layers at a
small width, 4 rows of 512 tokens, gradient checkpointing in both. Peaks are above what the model itself takes. The last
line is JSON; times are medians of the runs in turn.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint

from phi4_mlx.config import ModelConfig
from phi4_mlx.lora.layers import add_adapter
from phi4_mlx.lora.loss import next_token_loss
from phi4_mlx.models.text import Model

VOCABULARY = 200_064
CONFIG = {
    "model_type": "phi3", "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 3,
    "num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip


def tiny_model(layers: int) -> Model:
    """Phi-4-mini's vocabulary and ratio of heads at a small width, with an adapter."""
    mx.random.seed(0)
    model = Model(ModelConfig.from_dict({**CONFIG, "num_hidden_layers": layers}))
    add_adapter(model, rank=8)
    model.train()
    mx.eval(model.parameters())
    return model


def measure(run: Callable[[], Any]) -> tuple[float, int, float]:
    """(loss, peak in bytes above what was there before, seconds) of one run."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    result = run()
    mx.eval(result)
    return result[0].item(), mx.get_peak_memory() - before, time.perf_counter() - start


def compare(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], runs: int) -> dict[str, float]:
    """Runs both in turn; ratios of ours to mlx-lm's."""
    pairs = [(measure(ours), measure(theirs)) for _ in range(runs + 1)][1:]
    (loss, peak, _), (their_loss, their_peak, _) = pairs[0]
    seconds = median(a[2] / b[2] for a, b in pairs)
    print(f"{name}: {peak / 1e6:,.0f} MB beside {their_peak / 1e6:,.0f} MB, time ratio {seconds:.2f}")
    return {
        f"{name}_memory_ratio": round(peak / their_peak, 4),
        f"{name}_time_ratio": round(seconds, 3),
        f"{name}_loss_difference": abs(loss - their_loss),
    }


def main() -> None:
    """Prints both comparisons, then JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs

    model, ids = tiny_model(1), mx.random.randint(1, VOCABULARY, (1, 1025))
    mask, lengths = mx.ones((1, 1024), mx.bool_), mx.array([[0, 1025]])

    def our_loss() -> Any:
        (loss, _), grads = nn.value_and_grad(model, next_token_loss)(model, ids[:, :-1], ids[:, 1:], mask)
        return loss, grads

    def their_loss() -> Any:
        (loss, _), grads = nn.value_and_grad(model, default_loss)(model, ids, lengths)
        return loss, grads

    result = compare("loss", our_loss, their_loss, runs)
    result |= compare("step", *whole_steps(), runs)
    print(json.dumps({"bench": "loss", **result}))


def whole_steps() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A training step of each: 32 layers, 4 x 512 tokens, checkpointing, AdamW."""
    model, ids = tiny_model(32), mx.random.randint(1, VOCABULARY, (4, 513))
    mask, lengths = mx.ones((4, 512), mx.bool_), mx.array([[0, 513]] * 4)
    optimizer = optim.AdamW(learning_rate=0.0)
    optimizer.init(model.trainable_parameters())

    def ours() -> Any:
        model.model.recompute = True
        (loss, _), grads = nn.value_and_grad(model, next_token_loss)(model, ids[:, :-1], ids[:, 1:], mask)
        optimizer.update(model, grads)
        model.model.recompute = False
        return loss, model.trainable_parameters()

    def theirs() -> Any:
        layer = type(model.layers[0])
        call = layer.__call__
        grad_checkpoint(model.layers[0])
        (loss, _), grads = nn.value_and_grad(model, default_loss)(model, ids, lengths)
        optimizer.update(model, grads)
        layer.__call__ = call
        return loss, model.trainable_parameters()

    return ours, theirs


if __name__ == "__main__":
    main()

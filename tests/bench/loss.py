"""What the loss of a batch takes beside mlx-lm's: peak memory and time, at the true vocabulary.

    python tests/bench/loss.py [--runs 1]

First the loss with its gradient, 1,024 tokens, the head frozen as in LoRA; then a whole training step of 32 layers at a
small width, 4 rows of 512 tokens, gradient checkpointing in both. Peaks are above what the model itself takes. A run is
of minutes on a CPU; with more of them, times are medians of the runs in turn. The last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from peer import last_line

from phi4_mlx.adapters.layers import add_adapter
from phi4_mlx.config import ModelConfig
from phi4_mlx.lora.training.loss import next_token_loss
from phi4_mlx.models.text import Model

VOCABULARY = 200_064
CONFIG = {
    "model_type": "phi3", "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 3,
    "num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip

Loss = Callable[[mx.array], Any]  # of ids [B, T + 1]


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


def compare(name: str, ours: Loss, theirs: Loss, ids: mx.array, runs: int) -> dict[str, float]:
    """Runs both in turn, after a short piece of the ids; ratios of ours to mlx-lm's."""
    for each in (ours, theirs):
        measure(lambda each=each: each(ids[:, :9]))
    pairs = [(measure(lambda: ours(ids)), measure(lambda: theirs(ids))) for _ in range(runs)]
    (loss, peak, _), (their_loss, their_peak, _) = pairs[0]
    seconds = median(a[2] / b[2] for a, b in pairs)
    print(f"{name}: {peak / 1e6:,.0f} MB beside {their_peak / 1e6:,.0f} MB, time ratio {seconds:.2f}", flush=True)
    return {
        f"{name}_memory_ratio": round(peak / their_peak, 4),
        f"{name}_time_ratio": round(seconds, 3),
        f"{name}_loss_difference": abs(loss - their_loss),
    }


def losses(model: Model) -> tuple[Loss, Loss]:
    """(ours, mlx-lm's): from ids [B, T + 1] to the loss and its gradient, every token a target."""

    def ours(ids: mx.array) -> Any:
        mask = mx.ones((ids.shape[0], ids.shape[1] - 1), mx.bool_)
        (loss, _), grads = nn.value_and_grad(model, next_token_loss)(model, ids[:, :-1], ids[:, 1:], mask)
        return loss, grads

    def theirs(ids: mx.array) -> Any:
        lengths = mx.array([[0, ids.shape[1]]] * ids.shape[0])
        (loss, _), grads = nn.value_and_grad(model, default_loss)(model, ids, lengths)
        return loss, grads

    return ours, theirs


def steps(model: Model) -> tuple[Loss, Loss]:
    """The same with gradient checkpointing and an update of AdamW."""
    our_loss, their_loss = losses(model)
    optimizer = optim.AdamW(learning_rate=0.0)
    optimizer.init(model.trainable_parameters())

    def ours(ids: mx.array) -> Any:
        model.recompute = True
        loss, grads = our_loss(ids)
        optimizer.update(model, grads)
        model.recompute = False
        return loss, model.trainable_parameters()

    def theirs(ids: mx.array) -> Any:
        layer = type(model.layers[0])
        call = layer.__call__
        grad_checkpoint(model.layers[0])
        loss, grads = their_loss(ids)
        optimizer.update(model, grads)
        layer.__call__ = call
        return loss, model.trainable_parameters()

    return ours, theirs


def main() -> None:
    """Prints both comparisons, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    runs = parser.parse_args().runs
    result = compare("loss", *losses(tiny_model(1)), mx.random.randint(1, VOCABULARY, (1, 1025)), runs)
    result |= compare("step", *steps(tiny_model(32)), mx.random.randint(1, VOCABULARY, (4, 513)), runs)
    last_line("loss", result["loss_loss_difference"] < 1e-3, **result)


if __name__ == "__main__":
    main()
